#include "histogram.h"

void
histogram_add (struct histogram *histogram, int64_t us)
{
  unsigned i = us <= 0 ? 0 : 64 - (unsigned) __builtin_clzll ((uint64_t) us);

  if (i >= HISTOGRAM_BUCKETS)
    i = HISTOGRAM_BUCKETS - 1;
  __atomic_fetch_add (&histogram->buckets[i], 1, __ATOMIC_RELAXED);
}
