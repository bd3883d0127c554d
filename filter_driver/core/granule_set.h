/* A set of granules: a bitmap with a summary (one bit per 64-bit word), so that walking, joining
 * and emptying cost what is in it and not what the disk measures: the set of one second's writes
 * to a 10 TiB disk is walked at every guest flush.
 *
 * Not thread-safe: the owner's lock protects it.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GRANULE_NONE UINT64_MAX

struct granule_set {
  uint64_t granules; /* capacity: members are below it */
  uint64_t members;
  uint64_t *words;
  uint64_t *summary;
  size_t word_count;
  size_t summary_count;
};

int granule_set_init (struct granule_set *set, uint64_t granules);
void granule_set_free (struct granule_set *set);

bool granule_set_has (const struct granule_set *set, uint64_t granule);
void granule_set_add (struct granule_set *set, uint64_t granule);
void granule_set_remove (struct granule_set *set, uint64_t granule);
void granule_set_add_range (struct granule_set *set, uint64_t first, uint64_t count);
/* to := to + from, and from becomes empty. */
void granule_set_move (struct granule_set *to, struct granule_set *from);
/* The first member at or after `from`, or GRANULE_NONE. */
uint64_t granule_set_next (const struct granule_set *set, uint64_t from);
/* How many members follow each other from `first` (a member) on; at most `max`. */
uint64_t granule_set_run (const struct granule_set *set, uint64_t first, uint64_t max);
