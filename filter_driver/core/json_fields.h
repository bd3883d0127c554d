/* Strict reading of JSON objects: each field is taken by name and type; what was not taken is an error.
 *
 *     struct json_fields f = { .object = root };
 *     const char *vm = json_take_string (&f, "vm", sizeof buffer);
 *     json_take_done (&f, KNOWN...);
 *
 * The first fault is kept in `why`; later calls return harmless values, so that a reader checks once.
 */
#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define JSON_FIELDS_MAX 16

struct json_fields {
  json_t *object;
  const char *where; /* for the message, "" or "disks[0]." */
  char why[200];     /* "" while all is well */
  const char *taken[JSON_FIELDS_MAX];
  unsigned taken_count;
};

/* Strings are at least one byte long and shorter than `size`; never NULL: "" after a fault. */
const char *json_take_string (struct json_fields *f, const char *key, size_t size);
/* As above, but NULL for a JSON null. */
const char *json_take_string_or_null (struct json_fields *f, const char *key, size_t size);
uint64_t json_take_u64 (struct json_fields *f, const char *key, uint64_t min, uint64_t max);
bool json_take_bool (struct json_fields *f, const char *key);
json_t *json_take_object (struct json_fields *f, const char *key);
json_t *json_take_array (struct json_fields *f, const char *key, size_t min, size_t max);
/* -1 when there was a fault or a key was left over. */
int json_take_done (struct json_fields *f);
