/* Links: taking, giving back and losing the session that guest writes are forwarded on. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "clock.h"
#include "filter.h"
#include "resync.h"
#include "scope.h"
#include "text.h"

struct link *
link_get (struct filter *f, enum phase *phase)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  *phase = f->standing.phase;
  if (f->standing.phase == PHASE_RESTING)
    return NULL;
  __atomic_fetch_add (&f->link->refs, 1, __ATOMIC_RELAXED);
  return f->link;
}

struct link *
link_new (struct filter *f, struct mirror_session *session)
{
  struct link *link = calloc (1, sizeof *link);

  if (!link)
    return NULL;
  *link = (struct link) { .filter = f, .session = session, .refs = 1 };
  for (unsigned i = 0; i < f->disk_count; i++)
    if (fresh_map_init (&link->fresh[i], f->disks[i].map.granules) == -1) {
      while (i-- > 0)
        fresh_map_free (&link->fresh[i]);
      free (link);
      return NULL;
    }
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  f->live_links++;
  return link;
}

/* Without waiting: closing a session only gives resources back (mirror_dev.h). */
static void
link_free_locked (struct link *link)
{
  struct filter *f = link->filter;

  f->mirror->ops->close (link->session);
  for (unsigned i = 0; i < DISKS_MAX; i++)
    fresh_map_free (&link->fresh[i]);
  free (link);
  f->live_links--;
  pthread_cond_broadcast (&f->changed);
}

void
link_put (struct link *link)
{
  struct filter *f = link->filter;
  int left = __atomic_sub_fetch (&link->refs, 1, __ATOMIC_ACQ_REL);

  if (left == 0) {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    link_free_locked (link);
  } else if (__atomic_load_n (&f->quiescing, __ATOMIC_RELAXED)) {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    pthread_cond_broadcast (&f->changed);
  }
}

void
link_put_locked (struct link *link)
{
  if (__atomic_sub_fetch (&link->refs, 1, __ATOMIC_ACQ_REL) == 0)
    link_free_locked (link);
}

int
link_wait_all_closed (struct filter *f, int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);

  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  while (f->live_links > 0)
    if (pthread_cond_clockwait (&f->changed, &f->mu, CLOCK_MONOTONIC, &until) == ETIMEDOUT && f->live_links > 0) {
      errno = ETIMEDOUT;
      return -1;
    }
  return 0;
}

int
link_wait_unused (struct link *link, int64_t deadline_us)
{
  struct filter *f = link->filter;
  struct timespec until = deadline_timespec (deadline_us);
  int r = 0;

  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  __atomic_store_n (&f->quiescing, true, __ATOMIC_SEQ_CST);
  while (r == 0 && __atomic_load_n (&link->refs, __ATOMIC_SEQ_CST) > (f->link == link ? 2 : 1))
    r = pthread_cond_clockwait (&f->changed, &f->mu, CLOCK_MONOTONIC, &until);
  __atomic_store_n (&f->quiescing, false, __ATOMIC_SEQ_CST);
  errno = r;
  return r == 0 ? 0 : -1;
}

void
filter_lose_link_locked (struct filter *f, const char *cause)
{
  struct link *link = f->link;

  if (!link)
    return;
  if (f->standing.phase == PHASE_MIRRORING)
    f->saved.last_sync_unix_ms = (uint64_t) unix_ms ();
  f->link = NULL;
  f->connection++;
  f->standing.phase = PHASE_RESTING;
  f->standing.mirror_connected = false;
  for (unsigned i = 0; i < f->disk_count; i++)
    book_abandon (&f->disks[i].book, f->connection);
  f->mirror->ops->abandon (link->session);
  resync_cancel_locked (f);
  text_copy (f->cause, sizeof f->cause, cause);
  f->probe_fault[0] = '\0';
  log_line (LOG_WARNING, "state=%s mirror_connection=%" PRIu64 " reason=\"%s\"", state_name (state_of (&f->standing)),
            f->connection, f->cause);
  filter_changed_locked (f);
  if (__atomic_sub_fetch (&link->refs, 1, __ATOMIC_ACQ_REL) == 0)
    link_free_locked (link);
}

void
filter_lose_link (struct filter *f, struct link *link, const char *cause)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (f->link && (!link || f->link == link))
    filter_lose_link_locked (f, cause);
}

static const char *
error_words (int err)
{
  switch (err) {
  case ENOSPC:
    return "the mirror's datastore is full (ENOSPC)";
  case EDQUOT:
    return "the mirror's quota is used up (EDQUOT)";
  case EIO:
    return "the mirror answered an I/O error (EIO)";
  case EROFS:
  case EPERM:
  case EACCES:
    return "the mirror refuses to be written";
  case ESHUTDOWN:
    return "the mirror is shutting down (ESHUTDOWN)";
  case ENOTCONN:
  case ECONNRESET:
  case EPIPE:
    return "the connection to the mirror was lost";
  default:
    return strerror (err);
  }
}

void
filter_mirror_failed (struct filter *f, struct link *link, const struct disk *disk, const char *doing, int err)
{
  char cause[REASON_SIZE];

  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (!f->link || (link && f->link != link))
    return; /* the first failure names the cause; the others follow from it */
  if (err == ETIMEDOUT) {
    COUNT (f, mirror_timeouts, 1);
    text_format (cause, sizeof cause, "the mirror did not answer within %" PRIu32 " ms (%s%s%s)", f->config->stall_ms,
                 doing, disk ? " " : "", disk ? disk->config->name : "");
  } else {
    COUNT (f, mirror_errors, 1);
    text_format (cause, sizeof cause, "%s (%s%s%s)", error_words (err), doing, disk ? " " : "",
                 disk ? disk->config->name : "");
  }
  filter_lose_link_locked (f, cause);
}

void
filter_write_missed (struct filter *f, struct link *link)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  /* Before the books are merged a missed write is covered: the drain that comes waits for it. */
  if (f->link && f->link != link && f->standing.phase != PHASE_BEGUN)
    filter_lose_link_locked (f, "a write was received that could not be forwarded");
}
