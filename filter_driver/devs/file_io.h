/* One request at a time on a file, with a bounded wait, even when the file system hangs.
 *
 * A slot is an io_uring of its own, or, where that is refused or the call has no ring operation, a worker
 * thread.  Both own the buffer: a caller that gave up leaves the slot *busy* with buffer and request, and
 * the request may still end, or never.  A busy slot is never used again; it can be freed when
 * `file_io_busy` has become false.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FILE_IO_ALIGNMENT 4096u
#define FILE_IO_BUFFER_MAX (1u << 20)

enum file_op {
  FILE_READ,
  FILE_WRITE,
  FILE_DATASYNC,
  FILE_FALLOCATE, /* mode, offset, length */
  FILE_EXTENT,    /* worker thread only: whether offset is in a hole, and how far it or the data reaches (length) */
};

struct file_request {
  enum file_op op;
  int fd;
  int mode;
  uint32_t count; /* of the slot's buffer */
  uint64_t offset;
  uint64_t length;
};

struct file_io;

enum file_io_kind { FILE_IO_RING, FILE_IO_THREAD };

/* `wake_fd`: an eventfd; once it is readable all waits end with ESHUTDOWN.  NULL with errno. */
struct file_io *file_io_new (enum file_io_kind kind, int wake_fd);
/* At least `size` bytes, aligned; NULL without memory. */
uint8_t *file_io_buffer (struct file_io *io, uint32_t size);
/* The call's result (bytes for read and write, 0 else; FILE_EXTENT: 1 for a hole, `*length` set).
   -1 with ETIMEDOUT or ESHUTDOWN: the slot is busy from now on. */
int64_t file_io_run (struct file_io *io, const struct file_request *request, int64_t deadline_us, uint64_t *length);
bool file_io_busy (struct file_io *io);
void file_io_free (struct file_io *io);
