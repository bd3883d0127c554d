/* Little-endian numbers at byte offsets of a block (the offsets come from the generated vm_layout.h). */
#pragma once

#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t
le32_at (const uint8_t *block, size_t offset)
{
  uint32_t v;

  memcpy (&v, block + offset, sizeof v);
  return le32toh (v);
}

static inline uint64_t
le64_at (const uint8_t *block, size_t offset)
{
  uint64_t v;

  memcpy (&v, block + offset, sizeof v);
  return le64toh (v);
}

static inline void
le32_put (uint8_t *block, size_t offset, uint32_t v)
{
  v = htole32 (v);
  memcpy (block + offset, &v, sizeof v);
}

static inline void
le64_put (uint8_t *block, size_t offset, uint64_t v)
{
  v = htole64 (v);
  memcpy (block + offset, &v, sizeof v);
}
