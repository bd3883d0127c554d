/* Answers of a server that is slow, torn, wrong or gone: each ends in the right error, by the deadline. */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "nbd_transmission.h"

#define COOKIE UINT64_C (0x1122334455667788)

struct server {
  int fd;
  size_t read_bytes;          /* taken off the socket first */
  const void *answer;         /* then sent, byte by byte when `torn` */
  size_t answer_size;
  bool torn, close_after;
};

static void *
serve (void *opaque)
{
  struct server *s = opaque;
  static uint8_t sink[1 << 16];

  for (size_t left = s->read_bytes; left > 0;) {
    ssize_t n = read (s->fd, sink, left < sizeof sink ? left : sizeof sink);
    CHECK (n > 0);
    left -= (size_t) n;
  }
  for (size_t i = 0; i < s->answer_size; i += s->torn ? 1 : s->answer_size)
    CHECK (write (s->fd, (const uint8_t *) s->answer + i, s->torn ? 1 : s->answer_size) > 0);
  if (s->close_after)
    close (s->fd);
  return NULL;
}

/* errno of the request, 0 when it went well. */
static int
meet (struct server server, const struct nbd_request *request, int64_t timeout_ms, bool wake)
{
  int fds[2];
  pthread_t thread;
  bool woken = wake;

  CHECK (socketpair (AF_UNIX, SOCK_STREAM, 0, fds) == 0 && fcntl (fds[0], F_SETFL, O_NONBLOCK) == 0);
  if (wake)
    CHECK (shutdown (fds[0], SHUT_RDWR) == 0);
  server.fd = fds[1];
  CHECK (pthread_create (&thread, NULL, serve, &server) == 0);
  int64_t begin = now_us ();
  int r = nbd_transmit (fds[0], COOKIE, request, &woken, in_ms (timeout_ms)) == 0 ? 0 : errno;
  CHECK (now_us () - begin < (timeout_ms + 2000) * 1000);
  pthread_join (thread, NULL);
  close (fds[0]);
  if (!server.close_after)
    close (fds[1]);
  return r;
}

int
main (void)
{
  static uint8_t data[3 << 20]; /* more than a socket's buffer holds */
  struct nbd_request small = { .command = NBD_FLUSH }, large = { .command = NBD_WRITE, .buf = data, .count = sizeof data };
  struct __attribute__ ((packed)) {
    uint32_t magic, error;
    uint64_t cookie;
  } well = { htobe32 (0x67446698), 0, htobe64 (COOKIE) }, bad = well;

  for (int torn = 0; torn < 2; torn++) {
    CHECK (meet ((struct server) { .read_bytes = 28, .answer = &well, .answer_size = 16, .torn = torn }, &small, 5000, false)
           == 0);
    CHECK (meet ((struct server) { .read_bytes = 28 + sizeof data, .answer = &well, .answer_size = 16, .torn = torn }, &large,
                 5000, false)
           == 0);
  }
  static const struct {
    uint32_t wire;
    int err;
  } errors[] = { { 5, EIO }, { 28, ENOSPC }, { 108, ESHUTDOWN }, { 1, EPERM }, { 4711, EINVAL } };
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
    bad = well;
    bad.error = htobe32 (errors[i].wire);
    CHECK (meet ((struct server) { .read_bytes = 28, .answer = &bad, .answer_size = 16 }, &small, 5000, false)
           == errors[i].err);
  }
  bad = well;
  bad.magic = htobe32 (0x668e33ef); /* a structured reply, which nobody asked for */
  CHECK (meet ((struct server) { .read_bytes = 28, .answer = &bad, .answer_size = 16 }, &small, 5000, false) == EPROTO);
  bad = well;
  bad.cookie++;
  CHECK (meet ((struct server) { .read_bytes = 28, .answer = &bad, .answer_size = 16 }, &small, 5000, false) == EPROTO);

  CHECK (meet ((struct server) { .read_bytes = 28 }, &small, 100, false) == ETIMEDOUT);
  CHECK (meet ((struct server) { .read_bytes = 0 }, &large, 100, false) == ETIMEDOUT);
  CHECK (meet ((struct server) { .read_bytes = 28, .answer = &well, .answer_size = 7 }, &small, 100, false) == ETIMEDOUT);
  CHECK (meet ((struct server) { .read_bytes = 28, .close_after = true }, &small, 5000, false) == ENOTCONN);
  CHECK (meet ((struct server) { .read_bytes = 28, .answer = &well, .answer_size = 7, .close_after = true }, &small, 5000,
               false)
         == ENOTCONN);
  CHECK (meet ((struct server) { .close_after = true }, &large, 5000, false) == ENOTCONN);
  CHECK (meet ((struct server) { 0 }, &small, 5000, true) == ESHUTDOWN);
  return 0;
}
