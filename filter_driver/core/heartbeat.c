/* The heartbeat: flush every second what the guest did not flush itself, so that little is dirty when the
 * mirror is lost; and read the superblock when the guest is quiet, so that a mirror that died, hangs, or
 * was promoted is noticed without a write. */
#include <errno.h>

#include "clock.h"
#include "filter.h"
#include "scope.h"

int
filter_flush_unflushed (struct filter *f, struct link *link, int64_t deadline_us)
{
  for (unsigned i = 0; i < f->disk_count; i++) {
    struct disk *d = &f->disks[i];
    struct book_flush flush;

    if (!book_has_unflushed (&d->book))
      continue;
    book_flush_begin (&d->book, &flush, link->connection);
    int r = f->mirror->ops->flush (link->session, i, deadline_us);
    int err = errno;
    book_flush_end (&d->book, &flush, r == 0);
    if (r == -1) {
      filter_mirror_failed (f, link, d, "flushing", err);
      return -1;
    }
  }
  return 0;
}

static void
look_at_superblock (struct filter *f, struct link *link)
{
  char fault[MIRROR_FAULT_SIZE];
  struct superblock block;

  if (filter_check_superblock (f, link->session, &block, now_us () + filter_stall_us (f), fault) == VERDICT_TROUBLE)
    filter_lose_link (f, link, fault);
}

void *
heartbeat_main (void *opaque)
{
  struct filter *f = opaque;
  int64_t next_look_us = 0;

  for (;;) {
    {
      struct timespec until = deadline_timespec (in_ms (FLUSH_INTERVAL_MS));
      LOCK_FOR_CURRENT_SCOPE (&f->mu);
      while (!f->stopping && pthread_cond_clockwait (&f->changed, &f->mu, CLOCK_MONOTONIC, &until) != ETIMEDOUT)
        continue;
      if (f->stopping)
        return NULL;
    }
    enum phase phase;
    struct link *link = link_get (f, &phase);
    if (!link)
      continue;
    if (filter_flush_unflushed (f, link, now_us () + filter_stall_us (f)) == 0 && now_us () >= next_look_us) {
      look_at_superblock (f, link);
      next_look_us = in_ms (HEARTBEAT_INTERVAL_MS);
    }
    link_put (link);
  }
}
