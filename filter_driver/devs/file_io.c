#include "file_io.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "clock.h"
#include "scope.h"

#define TOKEN_REQUEST 1
#define TOKEN_WAKE 2
#define RING_ENTRIES 4

struct worker {
  pthread_t thread;
  pthread_mutex_t mu;
  pthread_cond_t asked;
  int done_fd; /* eventfd: a caller waits for it and for wake_fd at once */
  struct file_request request; /* [mu] */
  bool pending;                /* [mu] */
  bool stopping;               /* [mu] */
  int64_t result;              /* [mu] or -errno */
  uint64_t length;             /* [mu] */
};

struct file_io {
  enum file_io_kind kind;
  int wake_fd;
  bool busy; /* of the owner: a request was given up */
  bool woken;
  uint8_t *buffer;
  uint32_t buffer_size;
  struct io_uring ring;
  struct worker worker;
};

/* -- worker thread -- */

static int64_t
extent_of (const struct file_request *r, uint64_t *length)
{
  off_t data = lseek (r->fd, (off_t) r->offset, SEEK_DATA);

  if (data == -1 && errno == ENXIO) { /* a hole up to the end */
    *length = r->length;
    return 1;
  }
  if (data == -1)
    return -errno;
  bool hole = (uint64_t) data > r->offset;
  off_t end = hole ? data : lseek (r->fd, (off_t) r->offset, SEEK_HOLE);
  if (end == -1)
    return -errno;
  *length = (uint64_t) end - r->offset;
  return hole;
}

static int64_t
perform (struct file_io *io, const struct file_request *r, uint64_t *length)
{
  int64_t n;

  switch (r->op) {
  case FILE_READ:
    n = pread (r->fd, io->buffer, r->count, (off_t) r->offset);
    break;
  case FILE_WRITE:
    n = pwrite (r->fd, io->buffer, r->count, (off_t) r->offset);
    break;
  case FILE_DATASYNC:
    n = fdatasync (r->fd);
    break;
  case FILE_FALLOCATE:
    n = fallocate (r->fd, r->mode, (off_t) r->offset, (off_t) r->length);
    break;
  case FILE_EXTENT:
    return extent_of (r, length);
  default:
    return -EINVAL;
  }
  return n == -1 ? -errno : n;
}

static void *
worker_main (void *opaque)
{
  struct file_io *io = opaque;
  struct worker *w = &io->worker;
  const uint64_t one = 1;

  for (;;) {
    struct file_request request;
    uint64_t length = 0;
    {
      LOCK_FOR_CURRENT_SCOPE (&w->mu);
      while (!w->pending && !w->stopping)
        pthread_cond_wait (&w->asked, &w->mu);
      if (w->stopping)
        return NULL;
      request = w->request;
    }
    int64_t result = perform (io, &request, &length);
    LOCK_FOR_CURRENT_SCOPE (&w->mu);
    w->result = result;
    w->length = length;
    w->pending = false;
    ssize_t n = write (w->done_fd, &one, sizeof one);
    (void) n;
  }
}

static int
worker_start (struct file_io *io)
{
  struct worker *w = &io->worker;

  w->done_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (w->done_fd == -1)
    return -1;
  pthread_mutex_init (&w->mu, NULL);
  pthread_cond_init (&w->asked, NULL);
  int r = pthread_create (&w->thread, NULL, worker_main, io);
  if (r != 0) {
    close (w->done_fd);
    errno = r;
    return -1;
  }
  return 0;
}

static int64_t
worker_run (struct file_io *io, const struct file_request *request, int64_t deadline_us, uint64_t *length)
{
  struct worker *w = &io->worker;
  uint64_t seen;

  {
    LOCK_FOR_CURRENT_SCOPE (&w->mu);
    w->request = *request;
    w->pending = true;
    pthread_cond_signal (&w->asked);
  }
  for (;;) {
    struct pollfd fds[] = { { .fd = w->done_fd, .events = POLLIN }, { .fd = io->wake_fd, .events = POLLIN } };
    int n = poll (fds, 2, poll_timeout_ms (deadline_us));
    if (n > 0 && fds[0].revents)
      break;
    if (n > 0 && fds[1].revents)
      io->woken = true;
    if (io->woken || now_us () >= deadline_us) {
      io->busy = true;
      return io->woken ? -ESHUTDOWN : -ETIMEDOUT;
    }
  }
  ssize_t n = read (w->done_fd, &seen, sizeof seen);
  (void) n;
  LOCK_FOR_CURRENT_SCOPE (&w->mu);
  if (length)
    *length = w->length;
  return w->result;
}

/* -- io_uring -- */

static int
ring_start (struct file_io *io)
{
  int r = io_uring_queue_init (RING_ENTRIES, &io->ring, 0);

  if (r < 0) {
    errno = -r;
    return -1;
  }
  /* Goes in with the first request: from then on the session's end wakes this ring by itself. */
  struct io_uring_sqe *sqe = io_uring_get_sqe (&io->ring);
  io_uring_prep_poll_add (sqe, io->wake_fd, POLLIN);
  io_uring_sqe_set_data64 (sqe, TOKEN_WAKE);
  return 0;
}

static void
ring_prepare (struct file_io *io, const struct file_request *r)
{
  struct io_uring_sqe *sqe = io_uring_get_sqe (&io->ring);

  assert (sqe);
  switch (r->op) {
  case FILE_READ:
    io_uring_prep_read (sqe, r->fd, io->buffer, r->count, r->offset);
    break;
  case FILE_WRITE:
    io_uring_prep_write (sqe, r->fd, io->buffer, r->count, r->offset);
    break;
  case FILE_DATASYNC:
    io_uring_prep_fsync (sqe, r->fd, IORING_FSYNC_DATASYNC);
    break;
  default:
    assert (r->op == FILE_FALLOCATE);
    io_uring_prep_fallocate (sqe, r->fd, r->mode, (off_t) r->offset, (off_t) r->length);
    break;
  }
  io_uring_sqe_set_data64 (sqe, TOKEN_REQUEST);
}

/* Takes what has ended off the ring; true when the request is among it. */
static bool
ring_reap (struct file_io *io, int64_t *result)
{
  struct io_uring_cqe *cqe;
  bool ended = false;

  while (io_uring_peek_cqe (&io->ring, &cqe) == 0 && cqe) {
    if (io_uring_cqe_get_data64 (cqe) == TOKEN_WAKE)
      io->woken = true;
    else {
      *result = cqe->res;
      ended = true;
    }
    io_uring_cqe_seen (&io->ring, cqe);
  }
  return ended;
}

static int64_t
ring_run (struct file_io *io, const struct file_request *request, int64_t deadline_us)
{
  int64_t result;

  ring_prepare (io, request);
  for (;;) {
    int64_t left_us = deadline_us - now_us ();
    if (left_us < 0)
      left_us = 0;
    struct __kernel_timespec ts = { .tv_sec = left_us / 1000000, .tv_nsec = left_us % 1000000 * 1000 };
    struct io_uring_cqe *cqe;
    int r = io_uring_submit_and_wait_timeout (&io->ring, &cqe, 1, &ts, NULL);
    if (ring_reap (io, &result))
      return result;
    if (io->woken || now_us () >= deadline_us) {
      io->busy = true;
      return io->woken ? -ESHUTDOWN : -ETIMEDOUT;
    }
    if (r < 0 && r != -ETIME && r != -EINTR && r != -EAGAIN) {
      io->busy = true; /* the kernel may have taken it: what is not known is not free */
      return r;
    }
  }
}

/* -- both -- */

struct file_io *
file_io_new (enum file_io_kind kind, int wake_fd)
{
  struct file_io *io = calloc (1, sizeof *io);

  if (!io)
    return NULL;
  io->kind = kind;
  io->wake_fd = wake_fd;
  if ((kind == FILE_IO_RING ? ring_start (io) : worker_start (io)) == -1) {
    int err = errno;
    free (io);
    errno = err;
    return NULL;
  }
  return io;
}

uint8_t *
file_io_buffer (struct file_io *io, uint32_t size)
{
  void *buffer;

  assert (!io->busy && size <= FILE_IO_BUFFER_MAX);
  if (size <= io->buffer_size)
    return io->buffer;
  size = (size + FILE_IO_ALIGNMENT - 1) / FILE_IO_ALIGNMENT * FILE_IO_ALIGNMENT;
  if (posix_memalign (&buffer, FILE_IO_ALIGNMENT, size) != 0)
    return NULL;
  free (io->buffer);
  io->buffer = buffer;
  io->buffer_size = size;
  return io->buffer;
}

int64_t
file_io_run (struct file_io *io, const struct file_request *request, int64_t deadline_us, uint64_t *length)
{
  assert (!io->busy);
  int64_t r = io->kind == FILE_IO_RING ? ring_run (io, request, deadline_us)
                                       : worker_run (io, request, deadline_us, length);

  if (r >= 0)
    return r;
  errno = (int) -r;
  return -1;
}

bool
file_io_busy (struct file_io *io)
{
  int64_t result;

  if (!io->busy)
    return false;
  if (io->kind == FILE_IO_RING) {
    if (ring_reap (io, &result))
      io->busy = false;
  } else {
    LOCK_FOR_CURRENT_SCOPE (&io->worker.mu);
    io->busy = io->worker.pending;
  }
  return io->busy;
}

void
file_io_free (struct file_io *io)
{
  assert (!io->busy);
  if (io->kind == FILE_IO_RING)
    io_uring_queue_exit (&io->ring);
  else {
    {
      LOCK_FOR_CURRENT_SCOPE (&io->worker.mu);
      io->worker.stopping = true;
      pthread_cond_signal (&io->worker.asked);
    }
    pthread_join (io->worker.thread, NULL);
    close (io->worker.done_fd);
    pthread_mutex_destroy (&io->worker.mu);
    pthread_cond_destroy (&io->worker.asked);
  }
  free (io->buffer);
  free (io);
}
