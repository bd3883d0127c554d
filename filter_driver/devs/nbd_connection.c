#include "nbd_connection.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "mirror_dev.h"
#include "text.h"

#define BITMAP_CONTEXT "qemu:dirty-bitmap:"
/* The 1.1 protocol's block status lengths are 32 bits; a multiple of what any server aligns to. */
#define STATUS_REQUEST_MAX (UINT64_C (1) << 31)

static int
last_errno (void)
{
  int err = nbd_get_errno ();

  return err ? err : EIO;
}

/* Waits for the socket, once.  0: something may have happened. */
static int
wait_for_socket (struct nbd_connection *c, int64_t deadline_us)
{
  unsigned direction = nbd_aio_get_direction (c->nbd);
  struct pollfd pfd = { .fd = nbd_aio_get_fd (c->nbd),
                        .events = (short) ((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0)
                                           | (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0)) };

  if (pfd.fd == -1) {
    errno = ENOTCONN;
    return -1;
  }
  int r = poll (&pfd, 1, poll_timeout_ms (deadline_us));
  if (__atomic_load_n (&c->woken, __ATOMIC_ACQUIRE)) {
    errno = ESHUTDOWN;
    return -1;
  }
  if (r == -1)
    return errno == EINTR ? 0 : -1;
  if (r == 0) {
    if (now_us () < deadline_us)
      return 0;
    errno = ETIMEDOUT;
    return -1;
  }
  if (pfd.revents & (POLLIN | POLLHUP | POLLERR) && direction & LIBNBD_AIO_DIRECTION_READ)
    r = nbd_aio_notify_read (c->nbd);
  else
    r = nbd_aio_notify_write (c->nbd);
  if (r == -1) {
    errno = last_errno ();
    return -1;
  }
  return 0;
}

static int
connect_fault (char *fault, int64_t deadline_us)
{
  if (errno == ESHUTDOWN)
    text_copy (fault, MIRROR_FAULT_SIZE, "the connection was abandoned");
  else if (errno == ETIMEDOUT || now_us () >= deadline_us)
    text_copy (fault, MIRROR_FAULT_SIZE, "no answer from the NBD server");
  else {
    const char *why = nbd_get_error ();
    text_copy (fault, MIRROR_FAULT_SIZE, why ? why : "the NBD server closed the connection");
  }
  return -1;
}

static int
configure (struct nbd_connection *c, const struct nbd_wanted *w)
{
  char context[sizeof BITMAP_CONTEXT + 256];

  if (nbd_set_export_name (c->nbd, w->export_name) == -1
      || nbd_set_request_structured_replies (c->nbd, w->extents) == -1
      /* The callers check ranges; answers are checked by libnbd in any case. */
      || nbd_set_strict_mode (c->nbd, LIBNBD_STRICT_MASK & ~(unsigned) LIBNBD_STRICT_BOUNDS) == -1
      || nbd_set_pread_initialize (c->nbd, false) == -1)
    return -1;
  if (w->extents && nbd_add_meta_context (c->nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) == -1)
    return -1;
  if (w->bitmap) {
    text_format (context, sizeof context, BITMAP_CONTEXT "%s", w->bitmap);
    if (nbd_add_meta_context (c->nbd, context) == -1)
      return -1;
  }
  return 0;
}

static int
check_export (struct nbd_connection *c, const struct nbd_wanted *w, char *fault)
{
  int64_t size = nbd_get_size (c->nbd);

  if (w->size_bytes && size != (int64_t) w->size_bytes) {
    text_format (fault, MIRROR_FAULT_SIZE, "export %.64s has %jd bytes, the disk has %ju", w->export_name, (intmax_t) size,
                 (uintmax_t) w->size_bytes);
    return -1;
  }
  if (w->writable && nbd_is_read_only (c->nbd) != 0) {
    text_format (fault, MIRROR_FAULT_SIZE, "export %.64s is read-only", w->export_name);
    return -1;
  }
  if (w->writable && nbd_can_flush (c->nbd) != 1) {
    text_format (fault, MIRROR_FAULT_SIZE, "export %.64s cannot be flushed: nothing on it would ever be durable",
                 w->export_name);
    return -1;
  }
  c->fua = nbd_can_fua (c->nbd) == 1;
  c->taken_over = w->writable && !w->extents && nbd_get_tls_negotiated (c->nbd) == 0
                  && nbd_get_structured_replies_negotiated (c->nbd) == 0 && c->fd != -1;
  return 0;
}

int
nbd_connection_open (struct nbd_connection *c, const struct nbd_wanted *w, int64_t deadline_us, char *fault)
{
  *c = (struct nbd_connection) { .fd = -1 };
  c->nbd = nbd_create ();
  if (!c->nbd || configure (c, w) == -1 || nbd_aio_connect_unix (c->nbd, w->socket) == -1)
    return connect_fault (fault, deadline_us);
  __atomic_store_n (&c->fd, fcntl (nbd_aio_get_fd (c->nbd), F_DUPFD_CLOEXEC, 0), __ATOMIC_RELEASE);
  while (!nbd_aio_is_ready (c->nbd)) {
    if (nbd_aio_is_dead (c->nbd) || nbd_aio_is_closed (c->nbd)) {
      errno = ENOTCONN;
      return connect_fault (fault, deadline_us);
    }
    if (wait_for_socket (c, deadline_us) == -1)
      return connect_fault (fault, deadline_us);
  }
  return check_export (c, w, fault);
}

void
nbd_connection_wake (struct nbd_connection *c)
{
  int fd = __atomic_load_n (&c->fd, __ATOMIC_ACQUIRE);

  __atomic_store_n (&c->woken, true, __ATOMIC_RELEASE);
  if (c->nbd && fd != -1)
    shutdown (fd, SHUT_RDWR);
}

void
nbd_connection_close (struct nbd_connection *c)
{
  if (!c->nbd)
    return; /* never opened: then fd means nothing */
  nbd_close (c->nbd);
  c->nbd = NULL;
  if (c->fd != -1)
    close (c->fd);
  c->fd = -1;
}

int
nbd_connection_wait (struct nbd_connection *c, int64_t cookie, int64_t deadline_us)
{
  if (cookie == -1) {
    errno = __atomic_load_n (&c->woken, __ATOMIC_ACQUIRE) ? ESHUTDOWN : last_errno ();
    /* A handle that is dead says EINVAL ("invalid state"): what the user should read is why. */
    if (errno == EINVAL && (nbd_aio_is_dead (c->nbd) || nbd_aio_is_closed (c->nbd)))
      errno = ENOTCONN;
    return -1;
  }
  for (;;) {
    int r = nbd_aio_command_completed (c->nbd, (uint64_t) cookie);
    if (r == 1)
      return 0;
    if (r == -1) {
      errno = last_errno ();
      return -1;
    }
    if (nbd_aio_is_dead (c->nbd) || nbd_aio_is_closed (c->nbd)) {
      errno = ENOTCONN;
      return -1;
    }
    if (wait_for_socket (c, deadline_us) == -1)
      return -1;
  }
}

int
nbd_connection_request (struct nbd_connection *c, const struct nbd_request *r, int64_t deadline_us)
{
  uint32_t flags = r->fua ? LIBNBD_CMD_FLAG_FUA : 0;
  int64_t cookie;

  if (c->taken_over)
    return nbd_transmit (c->fd, ++c->cookie, r, &c->woken, deadline_us);
  switch (r->command) {
  case NBD_WRITE:
    cookie = nbd_aio_pwrite (c->nbd, r->buf, r->count, r->offset, NBD_NULL_COMPLETION, flags);
    break;
  case NBD_WRITE_ZEROES:
    cookie = nbd_aio_zero (c->nbd, r->count, r->offset, NBD_NULL_COMPLETION, flags);
    break;
  default:
    cookie = nbd_aio_flush (c->nbd, NBD_NULL_COMPLETION, 0);
    break;
  }
  return nbd_connection_wait (c, cookie, deadline_us);
}

struct first_extent {
  bool seen, zero, ended;
  uint64_t length;
};

static int
on_extents (void *opaque, const char *context, uint64_t offset, uint32_t *entries, size_t count, int *error)
{
  struct first_extent *first = opaque;

  (void) offset;
  (void) error;
  if (strcmp (context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0)
    return 0;
  for (size_t i = 0; i + 1 < count && !first->ended; i += 2) {
    /* Only `zero` promises zeroes; a mere hole promises nothing (NBD protocol, base:allocation). */
    bool zero = entries[i + 1] & LIBNBD_STATE_ZERO;
    if (first->seen && zero != first->zero)
      first->ended = true;
    else {
      first->seen = true;
      first->zero = zero;
      first->length += entries[i];
    }
  }
  return 0;
}

int
nbd_connection_zero_extent (struct nbd_connection *c, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                            uint64_t *length)
{
  struct first_extent first = { 0 };

  *zero = false;
  *length = count;
  if (nbd_can_meta_context (c->nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) != 1)
    return 0; /* nothing is known: everything may be data */
  if (count > STATUS_REQUEST_MAX)
    count = STATUS_REQUEST_MAX;
  nbd_extent_callback callback = { .callback = on_extents, .user_data = &first };
  int64_t cookie = nbd_aio_block_status (c->nbd, count, offset, callback, NBD_NULL_COMPLETION, 0);
  if (nbd_connection_wait (c, cookie, deadline_us) == -1)
    return -1;
  if (!first.seen || first.length == 0) {
    errno = EPROTO;
    return -1;
  }
  *zero = first.zero;
  /* The last extent of an answer may reach beyond what was asked. */
  *length = first.length < count ? first.length : count;
  return 0;
}
