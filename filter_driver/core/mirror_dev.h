/* A mirror, as the core sees it: implemented by devs/nbd_mirror.c, devs/file_mirror.c and the fake of
 * the tests.
 *
 * A *session* is everything between one connect and its end; it may be several NBD connections or
 * open files.  Its calls may come from many threads at once, except `close`, which comes when no other
 * call is under way and none will follow.  Every call returns by its deadline.
 *
 * Errors: -1 with errno.  ETIMEDOUT: the deadline passed; ESHUTDOWN: `abandon` was called; anything
 * else is the mirror's own answer or the end of the connection (ENOTCONN).  After any error of a write
 * or flush the core abandons the session: an implementation need not be usable afterwards.
 *
 * A flush covers every write of this session that was answered before the flush was called, by whichever
 * thread it was sent.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MIRROR_FAULT_SIZE 200

struct mirror_session; /* opaque to the core */

struct mirror_dev {
  const struct mirror_dev_ops *ops;
};

struct mirror_dev_ops {
  /* `probe`: only superblock and sizes are looked at, nothing will be written to the disks.
     NULL with `fault` saying what is wrong, in words for the user. */
  struct mirror_session *(*open) (struct mirror_dev *dev, bool probe, int64_t deadline_us, char *fault);
  int (*pwrite) (struct mirror_session *s, unsigned disk, const void *buf, uint32_t count, uint64_t offset, bool fua,
                 int64_t deadline_us);
  /* Zeroes; space may be given back. */
  int (*zero) (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, bool fua, int64_t deadline_us);
  int (*flush) (struct mirror_session *s, unsigned disk, int64_t deadline_us);
  /* How far from `offset` on the mirror is known to read as zero, or (`zero` false) is not. */
  int (*zero_extent) (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, int64_t deadline_us,
                      bool *zero, uint64_t *length);
  int (*super_read) (struct mirror_session *s, uint8_t *file, int64_t deadline_us);
  /* Durable when it returns. */
  int (*super_write) (struct mirror_session *s, const uint8_t *slot, uint32_t count, uint64_t offset, int64_t deadline_us);
  /* Wakes every caller at once; does not block; may be called from any thread, more than once. */
  void (*abandon) (struct mirror_session *s);
  void (*close) (struct mirror_session *s);
};
