/* A slot whose request hangs: the caller is free at its deadline, or when it is woken; the slot is not used
 * again before the request has ended, and its buffer lives that long. */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "file_io.h"
#include "scratch.h"

static const uint64_t one = 1;

/* A read of an empty pipe hangs like a read of a datastore that is gone. */
static void
hung_request_keeps_the_slot_busy (bool by_waking)
{
  int wake_fd = eventfd (0, EFD_NONBLOCK), pipe_fds[2];
  struct file_io *io = file_io_new (FILE_IO_RING, wake_fd);

  if (!io && (errno == EPERM || errno == ENOSYS)) {
    fprintf (stderr, "io_uring is refused here: the worker thread is the only way\n");
    close (wake_fd);
    return;
  }
  CHECK (io && pipe (pipe_fds) == 0);
  CHECK (file_io_buffer (io, 4096));
  if (by_waking)
    CHECK (write (wake_fd, &one, sizeof one) == sizeof one);
  struct file_request request = { .op = FILE_READ, .fd = pipe_fds[0], .count = 4096 };
  int64_t begin = now_us ();
  CHECK (file_io_run (io, &request, in_ms (by_waking ? 10000 : 50), NULL) == -1);
  CHECK (errno == (by_waking ? ESHUTDOWN : ETIMEDOUT));
  CHECK (now_us () - begin < 2000000);
  CHECK (file_io_busy (io));
  CHECK (write (pipe_fds[1], "x", 1) == 1);
  for (begin = now_us (); file_io_busy (io);)
    CHECK (now_us () - begin < 5000000);
  file_io_free (io);
  close (pipe_fds[0]);
  close (pipe_fds[1]);
  close (wake_fd);
}

static void
write_read_and_extents (enum file_io_kind kind, const char *path)
{
  int wake_fd = eventfd (0, EFD_NONBLOCK);
  FILE *file = fopen (path, "w+");
  struct file_io *io = file_io_new (kind, wake_fd), *seeker = file_io_new (FILE_IO_THREAD, wake_fd);
  uint64_t length;

  CHECK (file && ftruncate (fileno (file), 1 << 20) == 0);
  if (!io && (errno == EPERM || errno == ENOSYS))
    io = file_io_new (FILE_IO_THREAD, wake_fd);
  CHECK (io && seeker);
  struct file_request write_it = { .op = FILE_WRITE, .fd = fileno (file), .count = 4096, .offset = 65536 };
  memset (file_io_buffer (io, 4096), 'x', 4096);
  CHECK (file_io_run (io, &write_it, in_ms (5000), NULL) == 4096);
  struct file_request sync_it = { .op = FILE_DATASYNC, .fd = fileno (file) };
  CHECK (file_io_run (io, &sync_it, in_ms (5000), NULL) == 0);
  struct file_request read_it = { .op = FILE_READ, .fd = fileno (file), .count = 8192, .offset = 65536 - 4096 };
  uint8_t *buffer = file_io_buffer (io, 8192);
  CHECK (file_io_run (io, &read_it, in_ms (5000), NULL) == 8192);
  CHECK (buffer[4095] == 0 && buffer[4096] == 'x');
  struct file_request extent = { .op = FILE_EXTENT, .fd = fileno (file), .offset = 0, .length = 1 << 20 };
  CHECK (file_io_run (seeker, &extent, in_ms (5000), &length) == 1 && length == 65536);
  extent.offset = 65536;
  CHECK (file_io_run (seeker, &extent, in_ms (5000), &length) == 0 && length >= 4096 && length < 1 << 20);
  extent.offset = 1 << 19;
  CHECK (file_io_run (seeker, &extent, in_ms (5000), &length) == 1);
  read_it.fd = -1;
  CHECK (file_io_run (io, &read_it, in_ms (5000), NULL) == -1 && errno == EBADF);
  CHECK (!file_io_busy (io));
  file_io_free (io);
  file_io_free (seeker);
  fclose (file);
  close (wake_fd);
}

int
main (void)
{
  char folder[64], path[80];

  scratch_make (folder);
  snprintf (path, sizeof path, "%s/image", folder);
  write_read_and_extents (FILE_IO_RING, path);
  write_read_and_extents (FILE_IO_THREAD, path);
  hung_request_keeps_the_slot_busy (false);
  hung_request_keeps_the_slot_busy (true);
  scratch_remove (folder);
  return 0;
}
