/* What the guest's programs put on disks must be recognised without a log: sums and scrambled numbers. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* As zlib's. */
static inline uint32_t
crc32 (const void *data, size_t size)
{
  static uint32_t table[256];
  const unsigned char *p = data;
  uint32_t crc = ~0u;

  if (!table[255]) /* filled upwards: threads that race write the same values */
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; bit++)
        c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
      table[i] = c;
    }
  while (size--)
    crc = table[(crc ^ *p++) & 0xff] ^ (crc >> 8);
  return ~crc;
}

/* splitmix64 (Steele, Lea, Flood 2014): every number gives another one, far away from it. */
static inline uint64_t
scramble (uint64_t x)
{
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
