/* One libnbd handle, used synchronously by one thread at a time, with every wait bounded.
 *
 * The calling thread itself sends the command and polls for its answer: no other thread is woken on the
 * way (each needless wake-up costs 20 us).  `nbd_connection_wake` makes a waiting caller return at once by
 * shutting the socket down; it may be called by any thread while the connection is open.
 */
#pragma once

#include <libnbd.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nbd_transmission.h"

struct nbd_connection {
  struct nbd_handle *nbd;
  /* For the waker: a duplicate of the socket, since libnbd closes its own as soon as the connection is
     dead, and the number could be another file by the time somebody shuts it down.  Atomic; -1: none. */
  int fd;
  bool woken; /* atomic */
  bool fua;
  bool taken_over; /* after the negotiation: requests go through nbd_transmission.h */
  uint64_t cookie;
};

#define NBD_REQUEST_MAX (32u << 20)

struct nbd_wanted {
  const char *socket;
  const char *export_name;
  bool extents;       /* structured replies and base:allocation */
  const char *bitmap; /* also qemu:dirty-bitmap:NAME, or NULL */
  bool writable;
  uint64_t size_bytes;
};

/* -1 with `fault` in words for the user.  The connection must be closed afterwards in any case. */
int nbd_connection_open (struct nbd_connection *c, const struct nbd_wanted *wanted, int64_t deadline_us, char *fault);
void nbd_connection_wake (struct nbd_connection *c);
void nbd_connection_close (struct nbd_connection *c);

/* One write, zeroing or flush; `fua` only where the server has it (`c->fua`). */
int nbd_connection_request (struct nbd_connection *c, const struct nbd_request *request, int64_t deadline_us);

/* Waits for a command that nbd_aio_* has returned `cookie` for (-1: it failed at once). */
int nbd_connection_wait (struct nbd_connection *c, int64_t cookie, int64_t deadline_us);

/* How far from `offset` on the export reads as zero, or is not known to. */
int nbd_connection_zero_extent (struct nbd_connection *c, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                                uint64_t *length);
