/* Latency histogram: 24 buckets, bucket i counts what took less than 2^i microseconds (and was not
 * counted in a smaller one); the last one also takes everything longer. */
#pragma once

#include <stdint.h>

#define HISTOGRAM_BUCKETS 24

struct histogram {
  uint64_t buckets[HISTOGRAM_BUCKETS]; /* atomic */
};

void histogram_add (struct histogram *histogram, int64_t us);
