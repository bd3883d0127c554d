#include "granule_set.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

int
granule_set_init (struct granule_set *set, uint64_t granules)
{
  *set = (struct granule_set) { .granules = granules };
  set->word_count = (size_t) ((granules + 63) / 64);
  set->summary_count = (set->word_count + 63) / 64;
  /* calloc of this size is fresh zero pages: memory is used for what is touched. */
  set->words = calloc (set->word_count ? set->word_count : 1, sizeof *set->words);
  set->summary = calloc (set->summary_count ? set->summary_count : 1, sizeof *set->summary);
  if (!set->words || !set->summary) {
    granule_set_free (set);
    errno = ENOMEM;
    return -1;
  }
  return 0;
}

void
granule_set_free (struct granule_set *set)
{
  free (set->words);
  free (set->summary);
  *set = (struct granule_set) { 0 };
}

bool
granule_set_has (const struct granule_set *set, uint64_t granule)
{
  assert (granule < set->granules);
  return set->words[granule / 64] >> (granule % 64) & 1;
}

static void
add_bits (struct granule_set *set, size_t word, uint64_t bits)
{
  set->members += (uint64_t) __builtin_popcountll (bits & ~set->words[word]);
  set->words[word] |= bits;
  if (bits)
    set->summary[word / 64] |= UINT64_C (1) << (word % 64);
}

void
granule_set_add (struct granule_set *set, uint64_t granule)
{
  assert (granule < set->granules);
  add_bits (set, (size_t) (granule / 64), UINT64_C (1) << (granule % 64));
}

void
granule_set_remove (struct granule_set *set, uint64_t granule)
{
  size_t word = (size_t) (granule / 64);
  uint64_t bit = UINT64_C (1) << (granule % 64);

  assert (granule < set->granules);
  if (!(set->words[word] & bit))
    return;
  set->words[word] &= ~bit;
  set->members--;
  if (!set->words[word])
    set->summary[word / 64] &= ~(UINT64_C (1) << (word % 64));
}

void
granule_set_add_range (struct granule_set *set, uint64_t first, uint64_t count)
{
  assert (first <= set->granules && count <= set->granules - first);
  while (count) {
    uint64_t bit = first % 64;
    uint64_t here = 64 - bit < count ? 64 - bit : count;
    uint64_t ones = here == 64 ? UINT64_MAX : (UINT64_C (1) << here) - 1;
    add_bits (set, (size_t) (first / 64), ones << bit);
    first += here;
    count -= here;
  }
}

void
granule_set_move (struct granule_set *to, struct granule_set *from)
{
  assert (to->granules == from->granules);
  for (size_t s = 0; from->members && s < from->summary_count; s++)
    while (from->summary[s]) {
      size_t word = s * 64 + (size_t) __builtin_ctzll (from->summary[s]);
      add_bits (to, word, from->words[word]);
      from->members -= (uint64_t) __builtin_popcountll (from->words[word]);
      from->words[word] = 0;
      from->summary[s] &= from->summary[s] - 1;
    }
  assert (from->members == 0);
}

uint64_t
granule_set_next (const struct granule_set *set, uint64_t from)
{
  if (from >= set->granules || !set->members)
    return GRANULE_NONE;
  size_t word = (size_t) (from / 64);
  uint64_t bits = set->words[word] & UINT64_MAX << (from % 64);

  if (bits)
    return word * 64 + (uint64_t) __builtin_ctzll (bits);
  word++;
  for (size_t s = word / 64; s < set->summary_count; s++) {
    uint64_t summary = set->summary[s];
    if (s == word / 64)
      summary &= UINT64_MAX << (word % 64);
    if (summary) {
      size_t found = s * 64 + (size_t) __builtin_ctzll (summary);
      return found * 64 + (uint64_t) __builtin_ctzll (set->words[found]);
    }
  }
  return GRANULE_NONE;
}

uint64_t
granule_set_run (const struct granule_set *set, uint64_t first, uint64_t max)
{
  uint64_t end = max < set->granules - first ? first + max : set->granules;
  uint64_t at = first;

  assert (first < set->granules);
  while (at < end) {
    uint64_t missing = ~set->words[at / 64] >> (at % 64);
    if (missing) {
      at += (uint64_t) __builtin_ctzll (missing);
      break;
    }
    at += 64 - at % 64;
  }
  return (at < end ? at : end) - first;
}
