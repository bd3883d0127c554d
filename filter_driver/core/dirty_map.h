/* The dirty map: one bit per 64 KiB granule of a disk in an mmap'ed file, so that it survives a
 * crash of the filter at any instruction without a system call per write.
 *
 * The file is fully allocated when it is made: a full file system cannot become a SIGBUS at a
 * store into the mapping.  Its head (layout `dirty_map`) is written once, when the file is made,
 * and never again: a head that is rewritten in place could be torn by SIGKILL.  Bits beyond the
 * disk's end are zero.
 *
 * A crash of the *host* may lose bits that the kernel had not written back: that case is noticed
 * by the boot id in `filter.state` (state_file.h), not here.
 *
 * Bits are set and cleared atomically; who may clear one, and when, is the book's business.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct dirty_map {
  uint64_t granules;
  void *base;
  size_t map_bytes;
  uint64_t *words; /* behind the head, accessed with __atomic builtins only */
};

struct dirty_map_identity {
  uint8_t uuid[16];
  const char *disk_name;
  uint64_t disk_size_bytes;
  uint64_t generation; /* for a new file only */
};

/* Open, or make with every bit set.  -1 with a text that names file and field: nothing was changed. */
int dirty_map_open (struct dirty_map *map, const char *path, const struct dirty_map_identity *identity, char *why,
                    size_t why_size);
void dirty_map_close (struct dirty_map *map);

void dirty_map_set (struct dirty_map *map, uint64_t first, uint64_t count);
void dirty_map_clear (struct dirty_map *map, uint64_t granule);
bool dirty_map_has (const struct dirty_map *map, uint64_t granule);
/* Durable when it returns. */
int dirty_map_sync (struct dirty_map *map);
