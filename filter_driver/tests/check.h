/* A check that stays on in every build, and a random generator whose seed is the whole story of a failure. */
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                             \
  do {                                                                                                               \
    if (!(condition)) {                                                                                              \
      printf ("%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition);                               \
      fflush (stdout);                                                                                               \
      abort ();                                                                                                      \
    }                                                                                                                \
  } while (0)

struct dice {
  uint64_t state;
};

/* splitmix64 */
static inline uint64_t
roll (struct dice *d)
{
  uint64_t z = (d->state += UINT64_C (0x9E3779B97F4A7C15));

  z = (z ^ (z >> 30)) * UINT64_C (0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C (0x94D049BB133111EB);
  return z ^ (z >> 31);
}

static inline uint64_t
roll_below (struct dice *d, uint64_t n)
{
  return roll (d) % n;
}
