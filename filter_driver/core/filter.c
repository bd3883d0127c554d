#include "filter.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "clock.h"
#include "resync.h"
#include "scope.h"
#include "tee.h"
#include "text.h"

#define LAST_FLUSH_MS 2000
#define JOIN_MS 500

void
filter_changed_locked (struct filter *f)
{
  pthread_cond_broadcast (&f->changed);
  LOCK_FOR_CURRENT_SCOPE (&f->watchers_mu);
  for (unsigned i = 0; i < WATCHERS_MAX; i++)
    if (f->watchers[i] != -1) {
      const uint64_t one = 1;
      /* Non-blocking; a full counter wakes its reader as well. */
      ssize_t n = write (f->watchers[i], &one, sizeof one);
      (void) n;
    }
}

bool
disk_needs_book_locked (const struct disk *d)
{
  return (int64_t) d->client_connection > d->book_covers;
}

static void
fail_locked (struct filter *f, const char *why)
{
  if (f->standing.failed)
    return;
  filter_lose_link_locked (f, why);
  f->standing.failed = true;
  text_copy (f->cause, sizeof f->cause, why);
  log_line (LOG_ERROR, "state=FAILED reason=\"%s\"", f->cause);
  filter_changed_locked (f);
}

void
filter_fail (struct filter *f, const char *why)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  fail_locked (f, why);
}

int
filter_store_state (struct filter *f)
{
  struct state_file copy;
  char why[REASON_SIZE];

  LOCK_FOR_CURRENT_SCOPE (&f->state_io);
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (f->standing.failed) {
      errno = EIO;
      return -1;
    }
    copy = f->saved;
  }
  if (state_file_store (&copy, f->state_path) == 0)
    return 0;
  int err = errno;
  text_format (why, sizeof why, "state file %.150s cannot be written: %s", f->state_path, strerror (err));
  filter_fail (f, why);
  errno = err;
  return -1;
}

void
filter_fence_off (struct filter *f, const char *why)
{
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (state_is_terminal (&f->standing))
      return;
    filter_lose_link_locked (f, why);
    f->standing.fenced = true;
    text_copy (f->saved.fenced, sizeof f->saved.fenced, why);
    text_copy (f->cause, sizeof f->cause, why);
    log_line (LOG_ERROR, "state=FENCED reason=\"%s\"", why);
    filter_changed_locked (f);
  }
  filter_store_state (f);
}

int
filter_begin_operation (struct filter *f, int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);

  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  while (f->operating)
    if (pthread_cond_clockwait (&f->changed, &f->mu, CLOCK_MONOTONIC, &until) == ETIMEDOUT && f->operating) {
      errno = ETIMEDOUT;
      return -1;
    }
  f->operating = true;
  return 0;
}

void
filter_end_operation (struct filter *f)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  f->operating = false;
  pthread_cond_broadcast (&f->changed);
}

/* -- start and end -- */

static int
open_disk (struct filter *f, unsigned i, char *why, size_t why_size)
{
  struct disk *d = &f->disks[i];
  char path[PATH_MAX];
  struct dirty_map_identity id = { .disk_name = d->config->name,
                                   .disk_size_bytes = d->config->size_bytes,
                                   .generation = f->saved.generation };

  memcpy (id.uuid, f->config->protection, sizeof id.uuid);
  text_format (path, sizeof path, "%s/%s.dirty", f->config->state_dir, d->config->name);
  if (dirty_map_open (&d->map, path, &id, why, why_size) == -1)
    return -1;
  if (book_init (&d->book, &d->map) == -1) {
    text_format (why, why_size, "no memory for the book of %s", d->config->name);
    return -1;
  }
  return 0;
}

/* A map that cannot be read is not needed to accept (and mirror nothing of) guest writes: a plain one in
   memory takes its place, so that no path has to ask whether there is a book. */
static int
stand_in_disk (struct disk *d)
{
  if (d->book.map)
    return 0;
  dirty_map_close (&d->map);
  d->map.granules = granules_for_size (d->config->size_bytes);
  d->map.words = calloc ((size_t) (d->map.granules / 64 + 1), sizeof *d->map.words);
  return d->map.words ? book_init (&d->book, &d->map) : -1;
}

static void
check_boot (struct filter *f)
{
  char boot_id[64];

  state_file_boot_id (boot_id, sizeof boot_id);
  if (!f->saved.clean_stop && (!boot_id[0] || strcmp (boot_id, f->saved.boot_id) != 0)) {
    log_line (LOG_WARNING, "reason=\"the host was not stopped cleanly: all disks are copied again\"");
    for (unsigned i = 0; i < f->disk_count; i++)
      book_miss_all (&f->disks[i].book);
  }
  text_copy (f->saved.boot_id, sizeof f->saved.boot_id, boot_id);
  f->saved.clean_stop = false;
}

static int
load_state (struct filter *f, char *why, size_t why_size)
{
  text_format (f->state_path, sizeof f->state_path, "%s/filter.state", f->config->state_dir);
  int found = state_file_load (&f->saved, f->state_path, why, why_size);

  if (found == -1)
    return -1;
  if (found == 1) {
    memcpy (f->saved.protection, f->config->protection, sizeof f->saved.protection);
    f->saved.clean_stop = true; /* nothing was ever sent: new maps are all dirty anyway */
    return 0;
  }
  if (memcmp (f->saved.protection, f->config->protection, sizeof f->saved.protection) != 0) {
    char other[UUID_TEXT_SIZE];
    uuid_format (f->saved.protection, other);
    text_format (why, why_size, "state file %.150s: protection: it belongs to %s", f->state_path, other);
    return -1;
  }
  return 0;
}

static void
first_standing (struct filter *f)
{
  f->standing.synced = f->saved.synced;
  f->standing.paused = f->saved.paused[0];
  f->standing.fenced = f->saved.fenced[0];
  f->standing.failed_over = f->saved.failed_over[0];
  f->standing.detached = f->saved.detached;
  if (f->saved.failed_over[0])
    text_copy (f->cause, sizeof f->cause, f->saved.failed_over);
  else if (f->saved.fenced[0])
    text_copy (f->cause, sizeof f->cause, f->saved.fenced);
  else if (f->saved.detached)
    text_copy (f->cause, sizeof f->cause, "detached");
  else if (f->saved.paused[0])
    text_format (f->cause, sizeof f->cause, "paused: %s", f->saved.paused);
  else
    text_copy (f->cause, sizeof f->cause, f->saved.synced ? "the filter was started" : "waiting for the first sync");
}

struct filter *
filter_new (const struct config *config, struct mirror_dev *mirror, struct source_dev *source)
{
  char why[REASON_SIZE] = "";
  struct filter *f = calloc (1, sizeof *f);

  if (!f)
    return NULL;
  f->config = config;
  f->mirror = mirror;
  f->source = source;
  f->started_us = now_us ();
  f->disk_count = config->disk_count;
  f->copiers = COPIERS;
  pthread_mutex_init (&f->state_io, NULL);
  pthread_mutex_init (&f->mu, NULL);
  pthread_mutex_init (&f->watchers_mu, NULL);
  pthread_cond_init (&f->changed, NULL);
  for (unsigned i = 0; i < WATCHERS_MAX; i++)
    f->watchers[i] = -1;
  for (unsigned i = 0; i < f->disk_count; i++) {
    struct disk *d = &f->disks[i];
    d->filter = f;
    d->index = i;
    d->config = &config->disks[i];
    d->book_covers = -1;
    range_lock_init (&d->ranges);
    pthread_mutex_init (&d->clients_mu, NULL);
    pthread_cond_init (&d->request_ended, NULL);
  }

  int r = load_state (f, why, sizeof why);
  for (unsigned i = 0; r == 0 && i < f->disk_count; i++)
    r = open_disk (f, i, why, sizeof why);
  for (unsigned i = 0; i < f->disk_count; i++)
    if (stand_in_disk (&f->disks[i]) == -1) {
      free (f);
      return NULL;
    }
  if (r == -1) {
    filter_fail (f, why);
    return f;
  }
  check_boot (f);
  first_standing (f);
  filter_store_state (f);
  log_line (LOG_INFO, "state=%s generation=%" PRIu64 " reason=\"%s\"", state_name (state_of (&f->standing)),
            f->saved.generation, f->cause);
  return f;
}

int
filter_start_threads (struct filter *f)
{
  int r = pthread_create (&f->probe_thread, NULL, probe_main, f);

  if (r == 0)
    r = pthread_create (&f->heartbeat_thread, NULL, heartbeat_main, f);
  errno = r;
  f->threads_started = r == 0;
  return r == 0 ? 0 : -1;
}

/* What a last flush makes clean need not be copied after the next start. */
static void
flush_for_the_last_time (struct filter *f)
{
  int64_t deadline_us = in_ms (f->config->stall_ms < LAST_FLUSH_MS ? f->config->stall_ms : LAST_FLUSH_MS);
  enum phase phase;
  struct link *link = link_get (f, &phase);

  for (unsigned i = 0; i < f->disk_count; i++)
    tee_wait_requests (&f->disks[i], INT64_MAX, deadline_us);
  if (link) {
    filter_flush_unflushed (f, link, deadline_us);
    link_put (link);
  }
  filter_lose_link (f, NULL, "the filter is being stopped");
  for (unsigned i = 0; i < f->disk_count; i++)
    tee_wait_requests (&f->disks[i], INT64_MAX, deadline_us);
}

/* A thread may be on its way to a mirror that hangs: its end is not worth waiting for. */
static bool
thread_ended (pthread_t thread)
{
  struct timespec until = deadline_timespec (in_ms (JOIN_MS));

  return pthread_clockjoin_np (thread, NULL, CLOCK_MONOTONIC, &until) == 0;
}

bool
filter_stop (struct filter *f)
{
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    f->stopping = true;
    resync_cancel_locked (f);
    filter_changed_locked (f);
  }
  tee_hold_requests (f);
  flush_for_the_last_time (f);
  bool durable = !f->standing.failed;
  for (unsigned i = 0; durable && i < f->disk_count; i++)
    durable = dirty_map_sync (&f->disks[i].map) == 0;
  if (durable) {
    {
      LOCK_FOR_CURRENT_SCOPE (&f->mu);
      f->saved.clean_stop = true;
    }
    filter_store_state (f);
  }
  if (!f->threads_started)
    return true;
  bool probe_ended = thread_ended (f->probe_thread);
  return thread_ended (f->heartbeat_thread) && probe_ended;
}

void
filter_free (struct filter *f)
{
  resync_wait_ended (f, INT64_MAX);
  for (unsigned i = 0; i < f->disk_count; i++) {
    struct disk *d = &f->disks[i];
    if (!d->map.base)
      free (d->map.words);
    book_free (&d->book);
    dirty_map_close (&d->map);
    range_lock_destroy (&d->ranges);
    pthread_mutex_destroy (&d->clients_mu);
    pthread_cond_destroy (&d->request_ended);
  }
  free (f);
}
