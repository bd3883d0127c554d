#include "crc32.h"

uint32_t
crc32_update (uint32_t crc, const void *data, size_t size)
{
  const uint8_t *byte = data;

  /* Bitwise: it runs over a few KiB when a file is opened or a superblock is stamped, never per request. */
  crc = ~crc;
  while (size--) {
    crc ^= *byte++;
    for (int bit = 0; bit < 8; bit++)
      crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}
