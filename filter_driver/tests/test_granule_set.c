/* The set against a plain array, with seeds. */
#include <string.h>

#include "check.h"
#include "granule_set.h"

#define GRANULES 10007

static void
compare (const struct granule_set *set, const bool *model)
{
  uint64_t members = 0, next = 0;

  for (uint64_t g = 0; g < GRANULES; g++) {
    CHECK (granule_set_has (set, g) == model[g]);
    members += model[g];
  }
  CHECK (set->members == members);
  for (uint64_t g = granule_set_next (set, 0); g != GRANULE_NONE; g = granule_set_next (set, g + 1)) {
    while (next < g)
      CHECK (!model[next++]);
    CHECK (model[next++]);
  }
  while (next < GRANULES)
    CHECK (!model[next++]);
}

int
main (void)
{
  for (uint64_t seed = 0; seed < 20; seed++) {
    struct dice dice = { seed };
    struct granule_set a, b;
    bool model_a[GRANULES] = { false }, model_b[GRANULES] = { false };

    CHECK (granule_set_init (&a, GRANULES) == 0 && granule_set_init (&b, GRANULES) == 0);
    for (unsigned step = 0; step < 200; step++) {
      uint64_t first = roll_below (&dice, GRANULES);
      uint64_t count = roll_below (&dice, roll_below (&dice, 4) ? 70 : GRANULES) % (GRANULES - first + 1);
      switch (roll_below (&dice, 6)) {
      case 0:
      case 1:
        granule_set_add_range (&a, first, count);
        memset (model_a + first, true, count);
        break;
      case 2:
        granule_set_add (&b, first);
        model_b[first] = true;
        break;
      case 3:
        for (uint64_t g = first; g < first + count; g++) {
          granule_set_remove (&a, g);
          model_a[g] = false;
        }
        break;
      case 4:
        granule_set_move (&a, &b);
        for (unsigned g = 0; g < GRANULES; g++) {
          model_a[g] = model_a[g] || model_b[g];
          model_b[g] = false;
        }
        break;
      default:
        if (model_a[first]) {
          uint64_t run = granule_set_run (&a, first, 100), expected = 0;
          while (expected < 100 && first + expected < GRANULES && model_a[first + expected])
            expected++;
          CHECK (run == expected);
        }
      }
    }
    compare (&a, model_a);
    compare (&b, model_b);
    granule_set_free (&a);
    granule_set_free (&b);
  }
  return 0;
}
