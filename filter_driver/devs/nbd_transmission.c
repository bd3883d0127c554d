#include "nbd_transmission.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "clock.h"

#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC 0x67446698u
#define FLAG_FUA 1u

struct __attribute__ ((packed)) request_head {
  uint32_t magic;
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint64_t offset;
  uint32_t count;
};

struct __attribute__ ((packed)) reply {
  uint32_t magic;
  uint32_t error;
  uint64_t cookie;
};

static int
wait_for (int fd, short events, const bool *woken, int64_t deadline_us)
{
  for (;;) {
    struct pollfd pfd = { .fd = fd, .events = events };
    int r = poll (&pfd, 1, poll_timeout_ms (deadline_us));
    if (__atomic_load_n (woken, __ATOMIC_ACQUIRE)) {
      errno = ESHUTDOWN;
      return -1;
    }
    if (r > 0)
      return 0;
    if (r == -1 && errno != EINTR)
      return -1;
    if (now_us () >= deadline_us) {
      errno = ETIMEDOUT;
      return -1;
    }
  }
}

static int
connection_error (const bool *woken)
{
  if (__atomic_load_n (woken, __ATOMIC_ACQUIRE))
    errno = ESHUTDOWN;
  else if (errno == EPIPE || errno == ECONNRESET)
    errno = ENOTCONN;
  return -1;
}

static int
send_all (int fd, struct iovec *iov, size_t iov_count, const bool *woken, int64_t deadline_us)
{
  struct msghdr msg = { .msg_iov = iov, .msg_iovlen = iov_count };

  while (msg.msg_iovlen > 0) {
    ssize_t n = sendmsg (fd, &msg, MSG_NOSIGNAL);
    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1 && errno != EAGAIN)
      return connection_error (woken);
    if (n == -1 && wait_for (fd, POLLOUT, woken, deadline_us) == -1)
      return -1;
    for (; n > 0 && msg.msg_iovlen > 0; msg.msg_iov++, msg.msg_iovlen--) {
      size_t part = (size_t) n < msg.msg_iov->iov_len ? (size_t) n : msg.msg_iov->iov_len;
      msg.msg_iov->iov_base = (char *) msg.msg_iov->iov_base + part;
      msg.msg_iov->iov_len -= part;
      n -= (ssize_t) part;
      if (msg.msg_iov->iov_len > 0)
        break;
    }
  }
  return 0;
}

static int
receive_all (int fd, void *buf, size_t size, const bool *woken, int64_t deadline_us)
{
  for (size_t done = 0; done < size;) {
    /* Waited for first: the answer is never there yet, and a recv that only finds that out is for nothing. */
    if (wait_for (fd, POLLIN, woken, deadline_us) == -1)
      return -1;
    ssize_t n = recv (fd, (char *) buf + done, size - done, 0);
    if (n == 0) {
      errno = ENOTCONN;
      return connection_error (woken);
    }
    if (n == -1 && errno != EINTR && errno != EAGAIN)
      return connection_error (woken);
    if (n > 0)
      done += (size_t) n;
  }
  return 0;
}

/* proto.md, "Error values": they are Linux's numbers, and any other one means EINVAL. */
static int
error_of (uint32_t error)
{
  switch (error) {
  case EPERM:
  case EIO:
  case ENOMEM:
  case EINVAL:
  case ENOSPC:
  case EOVERFLOW:
  case ENOTSUP:
  case ESHUTDOWN:
    return (int) error;
  default:
    return EINVAL;
  }
}

int
nbd_transmit (int fd, uint64_t cookie, const struct nbd_request *r, const bool *woken, int64_t deadline_us)
{
  struct request_head head = { .magic = htobe32 (REQUEST_MAGIC),
                               .flags = htobe16 (r->fua ? FLAG_FUA : 0),
                               .type = htobe16 ((uint16_t) r->command),
                               .cookie = htobe64 (cookie),
                               .offset = htobe64 (r->offset),
                               .count = htobe32 (r->count) };
  struct iovec iov[] = { { &head, sizeof head }, { (void *) (uintptr_t) r->buf, r->count } };
  struct reply reply;

  if (send_all (fd, iov, r->command == NBD_WRITE ? 2 : 1, woken, deadline_us) == -1
      || receive_all (fd, &reply, sizeof reply, woken, deadline_us) == -1)
    return -1;
  if (be32toh (reply.magic) != REPLY_MAGIC || be64toh (reply.cookie) != cookie) {
    errno = EPROTO;
    return -1;
  }
  if (reply.error == 0)
    return 0;
  errno = error_of (be32toh (reply.error));
  return -1;
}
