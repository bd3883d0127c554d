/* The transmission phase of NBD for one request at a time, without a library between: a request is one
 * sendmsg, its answer one recv.
 *
 * libnbd makes the connection (negotiation, TLS one day).  It sends the head of a write and its data in two
 * system calls, so that a server on the same host is woken twice for each write: that costs more than the call
 * itself (docs/adr/0001-filter-threads.md).  A connection with simple replies and without TLS is therefore
 * taken over here after the negotiation; libnbd then only closes it.
 *
 * Protocol: doc/proto.md of github.com/NetworkBlockDevice/nbd, "Transmission".
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum nbd_command { NBD_WRITE = 1, NBD_FLUSH = 3, NBD_WRITE_ZEROES = 6 };

struct nbd_request {
  enum nbd_command command;
  bool fua;
  const void *buf; /* NBD_WRITE only */
  uint32_t count;
  uint64_t offset;
};

/* `fd` is non-blocking; `woken` ends the wait with ESHUTDOWN once the socket was shut down.  -1 with errno: the
   server's own error (the connection can be used further), or ETIMEDOUT, ESHUTDOWN, ENOTCONN, EPROTO. */
int nbd_transmit (int fd, uint64_t cookie, const struct nbd_request *request, const bool *woken, int64_t deadline_us);
