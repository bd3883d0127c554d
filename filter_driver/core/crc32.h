/* CRC-32 as zlib's (polynomial 0xEDB88320, reflected); `crc` chains calls and starts at 0. */
#pragma once

#include <stddef.h>
#include <stdint.h>

uint32_t crc32_update (uint32_t crc, const void *data, size_t size);
