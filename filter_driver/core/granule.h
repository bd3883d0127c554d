/* The unit of the dirty map. */
#pragma once

#include <stdint.h>

#define GRANULE_BYTES 65536u
#define SECTOR_BYTES 512u
#define SECTORS_PER_GRANULE (GRANULE_BYTES / SECTOR_BYTES)

/* The granules that a byte range touches; `count_bytes` is not zero. */
struct granule_range {
  uint64_t first;
  uint64_t count;
};

static inline struct granule_range
granules_of (uint64_t offset, uint64_t count_bytes)
{
  uint64_t first = offset / GRANULE_BYTES;

  return (struct granule_range) { first, (offset + count_bytes - 1) / GRANULE_BYTES - first + 1 };
}

static inline uint64_t
granules_for_size (uint64_t size_bytes)
{
  return size_bytes / GRANULE_BYTES + (size_bytes % GRANULE_BYTES != 0);
}
