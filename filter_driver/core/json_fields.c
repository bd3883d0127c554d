#include "json_fields.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

#include "text.h"

static void
fault (struct json_fields *f, const char *key, const char *what)
{
  if (!f->why[0])
    text_format (f->why, sizeof f->why, "%s%.60s: %s", f->where ? f->where : "", key, what);
}

static json_t *
take (struct json_fields *f, const char *key)
{
  assert (f->taken_count < JSON_FIELDS_MAX);
  f->taken[f->taken_count++] = key;
  json_t *value = json_object_get (f->object, key);
  if (!value)
    fault (f, key, "missing");
  return value;
}

static const char *
checked_string (struct json_fields *f, const char *key, const json_t *value, size_t size)
{
  if (!value)
    return "";
  if (!json_is_string (value))
    fault (f, key, "must be a string");
  else if (json_string_length (value) == 0)
    fault (f, key, "must not be empty");
  else if (json_string_length (value) >= size)
    fault (f, key, "is too long");
  else
    return json_string_value (value);
  return "";
}

const char *
json_take_string (struct json_fields *f, const char *key, size_t size)
{
  return checked_string (f, key, take (f, key), size);
}

const char *
json_take_string_or_null (struct json_fields *f, const char *key, size_t size)
{
  json_t *value = take (f, key);

  return json_is_null (value) ? NULL : checked_string (f, key, value, size);
}

uint64_t
json_take_u64 (struct json_fields *f, const char *key, uint64_t min, uint64_t max)
{
  json_t *value = take (f, key);

  if (!value)
    return min;
  json_int_t n = json_is_integer (value) ? json_integer_value (value) : -1;
  if (n < 0 || (uint64_t) n < min || (uint64_t) n > max) {
    char text[96];
    text_format (text, sizeof text, "must be a whole number from %" PRIu64 " to %" PRIu64, min, max);
    fault (f, key, text);
    return min;
  }
  return (uint64_t) n;
}

bool
json_take_bool (struct json_fields *f, const char *key)
{
  json_t *value = take (f, key);

  if (value && !json_is_boolean (value))
    fault (f, key, "must be true or false");
  return json_is_true (value);
}

json_t *
json_take_object (struct json_fields *f, const char *key)
{
  json_t *value = take (f, key);

  if (value && !json_is_object (value))
    fault (f, key, "must be an object");
  return json_is_object (value) ? value : NULL;
}

json_t *
json_take_array (struct json_fields *f, const char *key, size_t min, size_t max)
{
  json_t *value = take (f, key);

  if (!value)
    return NULL;
  if (!json_is_array (value) || json_array_size (value) < min || json_array_size (value) > max) {
    char text[96];
    text_format (text, sizeof text, "must be a list of %zu to %zu entries", min, max);
    fault (f, key, text);
    return NULL;
  }
  return value;
}

int
json_take_done (struct json_fields *f)
{
  const char *key;
  json_t *value;

  json_object_foreach (f->object, key, value)
  {
    bool known = false;
    for (unsigned i = 0; i < f->taken_count; i++)
      known = known || strcmp (f->taken[i], key) == 0;
    if (!known)
      fault (f, key, "is not known");
  }
  return f->why[0] ? -1 : 0;
}
