/* The guest's path: bring one request to the mirror, or note that the mirror does not have it.
 *
 * The range is marked dirty before anything is sent: after a crash at any instruction the dirty map
 * covers every range that may differ.  Whatever goes wrong on the mirror's side only changes the state.
 *
 * One request: range lock -> is its client still the newest? -> link -> book (dirty bit, in flight) ->
 * fresh sectors (during a resync) -> mirror -> book (unflushed).  All waits share one deadline, the
 * stall time from the request's arrival; the first request that reaches it abandons the link, which
 * wakes all the others.
 *
 * Old connections.  The source's hypervisor sends requests again that were in flight when its connection
 * broke.  A request of the old connection that still waits here must not reach the mirror after its newer
 * self: it holds its connection's number, which is compared under the range lock; a new connection takes
 * the next number (and the link away) first, and starts only when the old one's requests have ended.
 */
#include "tee.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>

#include "clock.h"
#include "scope.h"
#include "text.h"

enum change_kind { CHANGE_WRITE, CHANGE_ZERO };

struct change {
  enum change_kind kind;
  const void *buf;
  uint32_t count;
  uint64_t offset;
  bool fua;
  int64_t deadline_us;
};

static void
request_enter (struct disk *d, struct request *request)
{
  request->arrival_us = now_us ();
  request->prev = NULL;
  LOCK_FOR_CURRENT_SCOPE (&d->clients_mu);
  while (d->held)
    pthread_cond_wait (&d->request_ended, &d->clients_mu); /* until exit(2) */
  request->next = d->requests;
  if (request->next)
    request->next->prev = request;
  d->requests = request;
  d->request_count++;
}

static void
request_leave (struct disk *d, struct request *request)
{
  LOCK_FOR_CURRENT_SCOPE (&d->clients_mu);
  *(request->prev ? &request->prev->next : &d->requests) = request->next;
  if (request->next)
    request->next->prev = request->prev;
  d->request_count--;
  if (d->request_waiters)
    pthread_cond_broadcast (&d->request_ended);
}

static bool
is_newest (const struct client *client)
{
  return __atomic_load_n (&client->disk->client_connection, __ATOMIC_ACQUIRE) == client->connection;
}

/* Fresh sectors are counted in whole ones.  A guest's disk has no smaller writes; should one come anyway,
   neither fresh nor not fresh would be right for its sector. */
static int
mark_fresh (struct link *link, const struct disk *d, const struct change *c)
{
  if (c->offset % SECTOR_BYTES || c->count % SECTOR_BYTES) {
    errno = EINVAL;
    return -1;
  }
  return fresh_map_mark (&link->fresh[d->index], c->offset, c->count);
}

static void
forward (struct link *link, enum phase phase, struct disk *d, const struct change *c)
{
  struct filter *f = d->filter;
  const struct mirror_dev_ops *mirror = f->mirror->ops;
  struct book_write note;
  int r;

  bool to_be_copied = book_begin (&d->book, &note, c->offset, c->count, link->connection);
  if ((phase == PHASE_BEGUN || (phase == PHASE_COPYING && to_be_copied)) && mark_fresh (link, d, c) == -1) {
    bool unaligned = errno == EINVAL;
    book_end (&d->book, &note, false);
    filter_lose_link (f, link,
                      unaligned ? "a write that is not made of whole sectors came during a resync"
                                : "no memory to note what the guest writes during a resync");
    return;
  }
  if (c->kind == CHANGE_WRITE)
    r = mirror->pwrite (link->session, d->index, c->buf, c->count, c->offset, c->fua, c->deadline_us);
  else
    r = mirror->zero (link->session, d->index, c->count, c->offset, c->fua, c->deadline_us);
  int err = errno;
  book_end (&d->book, &note, r == 0);
  if (r == -1) {
    filter_mirror_failed (f, link, d, c->kind == CHANGE_WRITE ? "writing" : "zeroing", err);
    filter_write_missed (f, link);
  }
}

static void
tee_change (struct client *client, struct change *c)
{
  struct disk *d = client->disk;
  struct filter *f = d->filter;
  struct range_node range;
  struct request request;
  struct link *link = NULL;
  enum phase phase;

  assert (c->count > 0 && c->offset <= d->config->size_bytes && c->count <= d->config->size_bytes - c->offset);
  request_enter (d, &request);
  c->deadline_us = request.arrival_us + filter_stall_us (f);

  bool locked = range_lock_take (&d->ranges, &range, c->offset, c->count, c->deadline_us) == 0;
  if (!locked)
    filter_mirror_failed (f, NULL, d, "waiting for an earlier write to", ETIMEDOUT);
  else if (is_newest (client))
    link = link_get (f, &phase);
  if (link) {
    forward (link, phase, d, c);
    link_put (link);
  } else {
    book_missed (&d->book, c->offset, c->count);
    filter_write_missed (f, NULL);
  }
  if (locked)
    range_lock_release (&d->ranges, &range);
  histogram_add (&f->write_latency, now_us () - request.arrival_us);
  request_leave (d, &request);
}

void
tee_write (struct client *client, const void *buf, uint32_t count, uint64_t offset, bool fua)
{
  struct filter *f = client->disk->filter;

  COUNT (f, writes, 1);
  COUNT (f, write_bytes, count);
  tee_change (client, &(struct change) { CHANGE_WRITE, buf, count, offset, fua, 0 });
}

void
tee_zero (struct client *client, uint32_t count, uint64_t offset, bool fua)
{
  struct filter *f = client->disk->filter;

  COUNT (f, zeroes, 1);
  COUNT (f, zero_bytes, count);
  tee_change (client, &(struct change) { CHANGE_ZERO, NULL, count, offset, fua, 0 });
}

void
tee_flush (struct client *client)
{
  struct disk *d = client->disk;
  struct filter *f = d->filter;
  struct book_flush flush;
  struct request request;
  enum phase phase;

  COUNT (f, flushes, 1);
  request_enter (d, &request);
  struct link *link = is_newest (client) ? link_get (f, &phase) : NULL;
  if (link) {
    /* The mirror is asked even when we know of nothing unflushed: a flush under way on another thread
       may have taken the set and not be answered yet. */
    book_flush_begin (&d->book, &flush, link->connection);
    int r = f->mirror->ops->flush (link->session, d->index, request.arrival_us + filter_stall_us (f));
    int err = errno;
    book_flush_end (&d->book, &flush, r == 0);
    if (r == -1)
      filter_mirror_failed (f, link, d, "flushing", err);
    link_put (link);
  }
  histogram_add (&f->flush_latency, now_us () - request.arrival_us);
  request_leave (d, &request);
}

int
tee_wait_requests (struct disk *d, int64_t arrived_until_us, int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);

  LOCK_FOR_CURRENT_SCOPE (&d->clients_mu);
  for (;;) {
    bool waiting = false;
    for (const struct request *r = d->requests; r; r = r->next)
      waiting = waiting || r->arrival_us <= arrived_until_us;
    if (!waiting)
      return 0;
    if (now_us () >= deadline_us) {
      errno = ETIMEDOUT;
      return -1;
    }
    d->request_waiters++;
    pthread_cond_clockwait (&d->request_ended, &d->clients_mu, CLOCK_MONOTONIC, &until);
    d->request_waiters--;
  }
}

int
client_open (struct client *client, struct disk *d)
{
  struct filter *f = d->filter;
  int64_t deadline_us = now_us () + filter_stall_us (f);
  char cause[REASON_SIZE];

  *client = (struct client) { .disk = d };
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    client->connection = d->client_connection + 1;
    __atomic_store_n (&d->client_connection, client->connection, __ATOMIC_RELEASE);
    d->client_connected = true;
    text_format (cause, sizeof cause, "the source's hypervisor connected anew to %s: what it wrote meanwhile is in its book",
                 d->config->name);
    filter_lose_link_locked (f, cause);
    filter_changed_locked (f);
    log_line (LOG_INFO, "disk=%s client_connection=%" PRIu64, d->config->name, client->connection);
  }
  /* Only requests of older connections can be there: ours has not begun. */
  return tee_wait_requests (d, INT64_MAX, deadline_us);
}

void
client_close (struct client *client)
{
  struct disk *d = client->disk;
  struct filter *f = d->filter;

  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (d->client_connection == client->connection) {
    d->client_connected = false;
    filter_changed_locked (f);
  }
}

void
tee_hold_requests (struct filter *f)
{
  for (unsigned i = 0; i < f->disk_count; i++) {
    LOCK_FOR_CURRENT_SCOPE (&f->disks[i].clients_mu);
    f->disks[i].held = true;
  }
}

int64_t
tee_oldest_request_us (struct filter *f)
{
  int64_t now = now_us (), oldest = 0;

  for (unsigned i = 0; i < f->disk_count; i++) {
    LOCK_FOR_CURRENT_SCOPE (&f->disks[i].clients_mu);
    for (const struct request *r = f->disks[i].requests; r; r = r->next)
      if (now - r->arrival_us > oldest)
        oldest = now - r->arrival_us;
  }
  return oldest;
}
