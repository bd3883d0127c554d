#include "fresh_map.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "granule.h"

#define CHUNK_GRANULES 4096u
#define WORDS_PER_GRANULE (SECTORS_PER_GRANULE / 64)
#define CHUNK_WORDS (CHUNK_GRANULES * WORDS_PER_GRANULE)

int
fresh_map_init (struct fresh_map *map, uint64_t granules)
{
  *map = (struct fresh_map) { .granules = granules };
  map->chunk_count = (size_t) ((granules + CHUNK_GRANULES - 1) / CHUNK_GRANULES);
  map->chunks = calloc (map->chunk_count ? map->chunk_count : 1, sizeof *map->chunks);
  return map->chunks ? 0 : -1;
}

void
fresh_map_free (struct fresh_map *map)
{
  for (size_t i = 0; map->chunks && i < map->chunk_count; i++)
    free (map->chunks[i]);
  free (map->chunks);
  *map = (struct fresh_map) { 0 };
}

static uint64_t *
chunk_for_marking (struct fresh_map *map, size_t index)
{
  uint64_t *chunk = __atomic_load_n (&map->chunks[index], __ATOMIC_ACQUIRE);

  if (chunk)
    return chunk;
  uint64_t *made = calloc (CHUNK_WORDS, sizeof *made);
  if (!made)
    return NULL;
  if (__atomic_compare_exchange_n (&map->chunks[index], &chunk, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
    return made;
  free (made);
  return chunk;
}

int
fresh_map_mark (struct fresh_map *map, uint64_t offset, uint64_t count)
{
  uint64_t sector = offset / SECTOR_BYTES;
  uint64_t sectors = count / SECTOR_BYTES;

  assert (offset % SECTOR_BYTES == 0 && count % SECTOR_BYTES == 0);
  assert ((sector + sectors + SECTORS_PER_GRANULE - 1) / SECTORS_PER_GRANULE <= map->granules);
  while (sectors) {
    uint64_t word = sector / 64;
    uint64_t *chunk = chunk_for_marking (map, (size_t) (word / CHUNK_WORDS));
    if (!chunk) {
      errno = ENOMEM;
      return -1;
    }
    uint64_t bit = sector % 64;
    uint64_t here = 64 - bit < sectors ? 64 - bit : sectors;
    uint64_t ones = here == 64 ? UINT64_MAX : (UINT64_C (1) << here) - 1;
    __atomic_fetch_or (&chunk[word % CHUNK_WORDS], ones << bit, __ATOMIC_RELAXED);
    sector += here;
    sectors -= here;
  }
  return 0;
}

static uint64_t
word_at (const struct fresh_map *map, uint64_t word)
{
  const uint64_t *chunk = __atomic_load_n (&map->chunks[word / CHUNK_WORDS], __ATOMIC_ACQUIRE);

  return chunk ? __atomic_load_n (&chunk[word % CHUNK_WORDS], __ATOMIC_RELAXED) : 0;
}

uint64_t
fresh_map_run (const struct fresh_map *map, uint64_t offset, uint64_t count, bool *fresh)
{
  uint64_t sector = offset / SECTOR_BYTES;
  uint64_t end = sector + count / SECTOR_BYTES;
  uint64_t start = sector;

  assert (offset % SECTOR_BYTES == 0 && count % SECTOR_BYTES == 0 && count > 0);
  *fresh = word_at (map, sector / 64) >> (sector % 64) & 1;
  while (sector < end) {
    uint64_t bits = word_at (map, sector / 64);
    uint64_t differing = (*fresh ? ~bits : bits) >> (sector % 64);
    if (differing) {
      sector += (uint64_t) __builtin_ctzll (differing);
      break;
    }
    sector += 64 - sector % 64;
  }
  return ((sector < end ? sector : end) - start) * SECTOR_BYTES;
}
