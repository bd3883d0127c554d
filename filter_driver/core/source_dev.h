/* The source, read-only, as a resync reads it: devs/nbd_source.c and the fake of the tests.
 *
 * One reader is used by one thread, except `abandon`, which wakes that thread from another one.
 * Errors as in mirror_dev.h.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "mirror_dev.h"

struct source_reader;

/* `dirty` is called for each dirty extent of the bitmap. */
typedef void source_dirty_fn (void *opaque, uint64_t offset, uint64_t count);

struct source_dev {
  const struct source_dev_ops *ops;
};

struct source_dev_ops {
  /* `bitmap`: also negotiate QEMU's dirty bitmap of that name, or NULL. */
  struct source_reader *(*open) (struct source_dev *dev, const char *socket, const char *export_name, const char *bitmap,
                                 uint64_t size_bytes, int64_t deadline_us, char *fault);
  int (*pread) (struct source_reader *r, void *buf, uint32_t count, uint64_t offset, int64_t deadline_us);
  /* How far from `offset` on the source is known to read as zero, or is not. */
  int (*zero_extent) (struct source_reader *r, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                      uint64_t *length);
  /* Walks the whole bitmap. */
  int (*dirty_extents) (struct source_reader *r, int64_t deadline_us, source_dirty_fn *dirty, void *opaque);
  void (*abandon) (struct source_reader *r);
  void (*close) (struct source_reader *r);
};
