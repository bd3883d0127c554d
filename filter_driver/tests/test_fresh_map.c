/* Fresh sectors against a plain array, over a chunk border. */
#include <string.h>

#include "check.h"
#include "fresh_map.h"
#include "granule.h"

#define GRANULES 8200u
#define FIRST_SECTOR (4095u * SECTORS_PER_GRANULE) /* around the end of the first chunk */
#define SECTORS 512u

int
main (void)
{
  for (uint64_t seed = 0; seed < 50; seed++) {
    struct dice dice = { seed };
    struct fresh_map map;
    bool model[SECTORS] = { false };

    CHECK (fresh_map_init (&map, GRANULES) == 0);
    for (unsigned step = 0; step < 40; step++) {
      uint64_t first = roll_below (&dice, SECTORS), count = 1 + roll_below (&dice, SECTORS - first) % 150;
      if (roll_below (&dice, 3)) {
        CHECK (fresh_map_mark (&map, (FIRST_SECTOR + first) * SECTOR_BYTES, count * SECTOR_BYTES) == 0);
        memset (model + first, true, count);
        continue;
      }
      bool fresh;
      uint64_t expected = 0, run = fresh_map_run (&map, (FIRST_SECTOR + first) * SECTOR_BYTES, count * SECTOR_BYTES, &fresh);
      CHECK (fresh == model[first]);
      while (expected < count && model[first + expected] == fresh)
        expected++;
      CHECK (run == expected * SECTOR_BYTES);
    }
    CHECK (map.chunk_count == 3 && !map.chunks[2]); /* what is not touched takes no memory */
    fresh_map_free (&map);
  }
  return 0;
}
