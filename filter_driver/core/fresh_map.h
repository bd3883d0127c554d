/* Fresh sectors: what the guest wrote through the filter since a resync began, 512 bytes each.
 *
 * The copier must not put older source contents over them.  128 sectors (16 bytes) per granule,
 * allocated in chunks of 4096 granules (256 MiB of disk, 64 KiB of memory) at the first mark.
 *
 * A map belongs to one mirror connection and goes with it: a late thread of an abandoned
 * connection can only mark the map of that connection.
 *
 * Locking: marking and looking at a range happen under the disk's range lock on that range, so
 * bits of one range never race; neighbours share 64-bit words, therefore the bits are atomic.
 * Chunks are published with a compare-and-swap.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fresh_map {
  uint64_t granules;
  size_t chunk_count;
  uint64_t **chunks;
};

int fresh_map_init (struct fresh_map *map, uint64_t granules);
void fresh_map_free (struct fresh_map *map);

/* `offset` and `count` are multiples of 512.  -1 with ENOMEM: the caller must not go on with the copy. */
int fresh_map_mark (struct fresh_map *map, uint64_t offset, uint64_t count);
/* How many bytes from `offset` on (at most `count`, both multiples of 512) are all fresh or all not. */
uint64_t fresh_map_run (const struct fresh_map *map, uint64_t offset, uint64_t count, bool *fresh);
