#include "resync.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "copier.h"
#include "scope.h"
#include "text.h"

#define BOOKS_TIMEOUT_MS 30000
#define PASSES_MAX 16

int
refuse (struct refusal *refusal, enum refusal_class class, const char *fmt, ...)
{
  va_list args;

  refusal->class = class;
  va_start (args, fmt);
  vsnprintf (refusal->message, sizeof refusal->message, fmt, args);
  va_end (args);
  return -1;
}

/* -- begin -- */

static int
begin_is_allowed (struct filter *f, struct refusal *refusal)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (state_is_terminal (&f->standing))
    return refuse (refusal, REFUSED_WRONG_STATE, "the state is %s: %.180s", state_name (state_of (&f->standing)),
                   f->cause);
  if (f->standing.paused)
    return refuse (refusal, REFUSED_WRONG_STATE, "it is paused: %.200s", f->saved.paused);
  return 0;
}

static void
note_mirror_trouble (struct filter *f, const char *fault)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (state_is_terminal (&f->standing))
    return;
  f->standing.mirror_connected = false;
  text_copy (f->probe_fault, sizeof f->probe_fault, fault);
  filter_changed_locked (f);
}

/* The superblock is judged before anything is written, and says `inconsistent` durably before the first
   write out of order. */
static int
prepare_session (struct filter *f, struct mirror_session *s, int64_t deadline_us, char *fault)
{
  struct superblock block;

  if (filter_check_superblock (f, s, &block, deadline_us, fault) != VERDICT_OURS)
    return -1;
  if (!block.consistent)
    return 0;
  block.consistent = false;
  if (filter_stamp (f, s, &block, deadline_us) == 0)
    return 0;
  text_format (fault, MIRROR_FAULT_SIZE, "the mirror's superblock cannot be written: %s", strerror (errno));
  return -1;
}

int
resync_begin (struct filter *f, uint64_t *connection, struct refusal *refusal)
{
  int64_t deadline_us = now_us () + filter_stall_us (f);
  char fault[MIRROR_FAULT_SIZE] = "";

  if (begin_is_allowed (f, refusal) == -1)
    return -1;
  filter_lose_link (f, NULL, "a resync begins");
  if (resync_wait_ended (f, deadline_us) == -1)
    return refuse (refusal, REFUSED_INTERNAL, "the copier of the last resync has not ended yet");
  if (link_wait_all_closed (f, deadline_us) == -1)
    return refuse (refusal, REFUSED_MIRROR, "requests of the last mirror connection have not ended yet");

  struct mirror_session *s = f->mirror->ops->open (f->mirror, false, deadline_us, fault);
  if (!s) {
    note_mirror_trouble (f, fault);
    return refuse (refusal, REFUSED_MIRROR, "%s", fault);
  }
  if (prepare_session (f, s, deadline_us, fault) == -1) {
    f->mirror->ops->close (s);
    note_mirror_trouble (f, fault);
    return refuse (refusal, REFUSED_MIRROR, "%s", fault);
  }
  struct link *link = link_new (f, s);
  if (!link) {
    f->mirror->ops->close (s);
    return refuse (refusal, REFUSED_INTERNAL, "no memory");
  }
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (!f->stopping && !state_is_terminal (&f->standing) && !f->standing.paused) {
      *connection = link->connection = ++f->connection;
      for (unsigned i = 0; i < f->disk_count; i++)
        book_abandon (&f->disks[i].book, f->connection);
      f->link = link;
      f->standing.phase = PHASE_BEGUN;
      f->standing.mirror_connected = true;
      f->probe_fault[0] = '\0';
      text_copy (f->cause, sizeof f->cause, "waiting for the source to be drained");
      log_line (LOG_INFO, "state=%s mirror_connection=%" PRIu64, state_name (state_of (&f->standing)), f->connection);
      filter_changed_locked (f);
      return 0;
    }
  }
  link_put (link);
  return refuse (refusal, REFUSED_WRONG_STATE, "the state changed meanwhile");
}

/* -- copy: the books -- */

static int
refuse_stale (struct filter *f, uint64_t connection, struct refusal *refusal)
{
  return refuse (refusal, REFUSED_STALE, "mirror connection %" PRIu64 " is not the current one (%" PRIu64 ")",
                 connection, f->connection);
}

static int
copy_is_allowed (struct filter *f, uint64_t connection, const struct copy_source *sources, bool *needed,
                 struct refusal *refusal)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (!f->link || f->connection != connection)
    return refuse_stale (f, connection, refusal);
  if (f->standing.phase != PHASE_BEGUN)
    return refuse (refusal, REFUSED_WRONG_STATE, "this mirror connection has its books already");
  for (unsigned i = 0; i < f->disk_count; i++) {
    const struct disk *d = &f->disks[i];
    if (sources[i].covers > d->client_connection)
      return refuse (refusal, REFUSED_BAD_REQUEST, "%s has had %" PRIu64 " client connections, not %" PRIu64,
                     d->config->name, d->client_connection, sources[i].covers);
    /* A hypervisor that is away may be writing without us at this moment. */
    needed[i] = disk_needs_book_locked (d) || !d->client_connected;
  }
  return 0;
}

static void
add_extent (void *opaque, uint64_t offset, uint64_t count)
{
  struct granule_range range = granules_of (offset, count);

  granule_set_add_range (opaque, range.first, range.count);
}

static int
read_book (struct filter *f, unsigned i, const struct copy_source *from, bool needed, struct granule_set *book,
           struct refusal *refusal)
{
  const struct disk *d = &f->disks[i];
  char fault[MIRROR_FAULT_SIZE];
  struct source_reader *r
    = f->source->ops->open (f->source, from->socket, from->export_name, from->bitmap[0] ? from->bitmap : NULL,
                            d->config->size_bytes, in_ms (BOOKS_TIMEOUT_MS), fault);

  if (!r)
    return refuse (refusal, REFUSED_INTERNAL, "the source's export of %s: %s", d->config->name, fault);
  int result = 0;
  if (from->bitmap[0]) {
    result = f->source->ops->dirty_extents (r, in_ms (BOOKS_TIMEOUT_MS), add_extent, book);
    if (result == -1)
      refuse (refusal, REFUSED_INTERNAL, "the book of %s (bitmap %.64s) cannot be read: %s", d->config->name, from->bitmap,
              strerror (errno));
  } else if (needed)
    granule_set_add_range (book, 0, d->map.granules);
  f->source->ops->close (r);
  return result;
}

/* All books are read before the first is merged: a failure leaves nothing changed. */
static int
merge_books (struct filter *f, const struct copy_source *sources, const bool *needed, uint64_t *merged_bytes,
             struct refusal *refusal)
{
  struct granule_set books[DISKS_MAX] = { 0 };
  int r = 0;

  *merged_bytes = 0;
  for (unsigned i = 0; r == 0 && i < f->disk_count; i++) {
    if (granule_set_init (&books[i], f->disks[i].map.granules) == -1)
      r = refuse (refusal, REFUSED_INTERNAL, "no memory for the book of disk%u", i);
    else
      r = read_book (f, i, &sources[i], needed[i], &books[i], refusal);
  }
  for (unsigned i = 0; r == 0 && i < f->disk_count; i++) {
    *merged_bytes += books[i].members * GRANULE_BYTES;
    book_add_set (&f->disks[i].book, &books[i]);
    if (dirty_map_sync (&f->disks[i].map) == -1) {
      filter_fail (f, "the dirty map cannot be written");
      r = refuse (refusal, REFUSED_INTERNAL, "the dirty map of disk%u cannot be written: %s", i, strerror (errno));
    }
  }
  for (unsigned i = 0; i < f->disk_count; i++)
    granule_set_free (&books[i]);
  return r;
}

/* -- copy: the job -- */

struct copier_thread {
  struct copy_job *job;
  unsigned slot;
};

static void *
copier_main (void *opaque)
{
  const struct copier_thread *t = opaque;

  copier_run (t->job, t->slot);
  return NULL;
}

static uint64_t
granules_to_copy (struct filter *f)
{
  uint64_t granules = 0;

  for (unsigned i = 0; i < f->disk_count; i++)
    granules += book_copy_granules (&f->disks[i].book);
  return granules;
}

static void
run_copiers (struct copy_job *job)
{
  struct copier_thread threads[COPIERS];
  pthread_t ids[COPIERS];
  unsigned started = 0;

  {
    LOCK_FOR_CURRENT_SCOPE (&job->mu);
    job->cursor_disk = 0;
    job->cursor_granule = 0;
  }
  for (; started < job->f->copiers - 1; started++) {
    threads[started] = (struct copier_thread) { job, started };
    if (pthread_create (&ids[started], NULL, copier_main, &threads[started]) != 0)
      break;
  }
  copier_run (job, COPIERS - 1); /* this thread copies as well: it works with no other one, too */
  for (unsigned i = 0; i < started; i++)
    pthread_join (ids[i], NULL);
}

static bool
is_current (struct copy_job *job)
{
  LOCK_FOR_CURRENT_SCOPE (&job->f->mu);
  return job->f->link == job->link && !job->f->stopping;
}

/* A disk whose books leave a client connection out; NULL: none. */
static const struct disk *
disk_without_book_locked (const struct filter *f)
{
  for (unsigned i = 0; i < f->disk_count; i++)
    if (disk_needs_book_locked (&f->disks[i]))
      return &f->disks[i];
  return NULL;
}

/* Nothing is left to copy: make the mirror's superblock say so, then MIRRORING. */
static void
enter_mirroring (struct copy_job *job)
{
  struct filter *f = job->f;
  struct mirror_session *s = job->link->session;
  int64_t deadline_us = now_us () + filter_stall_us (f);
  char fault[MIRROR_FAULT_SIZE];
  struct superblock block;

  for (unsigned i = 0; i < f->disk_count; i++) {
    struct book_flush flush;
    book_flush_begin (&f->disks[i].book, &flush, job->link->connection);
    int r = f->mirror->ops->flush (s, i, deadline_us);
    int err = errno;
    book_flush_end (&f->disks[i].book, &flush, r == 0);
    if (r == -1) {
      filter_mirror_failed (f, job->link, &f->disks[i], "flushing", err);
      return;
    }
  }
  enum verdict verdict = filter_check_superblock (f, s, &block, deadline_us, fault);
  if (verdict != VERDICT_OURS) {
    if (verdict == VERDICT_TROUBLE)
      filter_lose_link (f, job->link, fault);
    return;
  }
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (f->link != job->link)
      return;
    const struct disk *missing = disk_without_book_locked (f);
    if (missing) {
      char cause[REASON_SIZE];
      text_format (cause, sizeof cause, "%s needs a book of its newest client connection (%" PRIu64 ")",
                   missing->config->name, missing->client_connection);
      filter_lose_link_locked (f, cause);
      return;
    }
    f->saved.generation++;
    f->saved.synced = true;
    f->saved.last_sync_unix_ms = (uint64_t) unix_ms ();
    block.generation = f->saved.generation;
    block.last_sync_unix_ms = f->saved.last_sync_unix_ms;
  }
  if (filter_store_state (f) == -1)
    return;
  block.consistent = true;
  if (filter_stamp (f, s, &block, deadline_us) == -1) {
    filter_mirror_failed (f, job->link, NULL, "writing the superblock", errno);
    return;
  }
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    f->saved.stamped_generation = block.generation;
    f->standing.synced = true;
    if (f->link == job->link) {
      f->standing.phase = PHASE_MIRRORING;
      f->cause[0] = '\0';
      log_line (LOG_INFO, "state=MIRRORING generation=%" PRIu64, block.generation);
    }
    filter_changed_locked (f);
  }
  filter_store_state (f);
}

static void *
coordinator_main (void *opaque)
{
  struct copy_job *job = opaque;
  struct filter *f = job->f;

  for (unsigned pass = 0; is_current (job); pass++) {
    if (granules_to_copy (f) == 0) {
      enter_mirroring (job);
      break;
    }
    if (pass == PASSES_MAX) {
      filter_lose_link (f, job->link, "the copy does not come to an end");
      break;
    }
    run_copiers (job);
  }
  link_put (job->link);
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    f->copy = NULL;
    filter_changed_locked (f);
  }
  pthread_mutex_destroy (&job->mu);
  free (job);
  return NULL;
}

static int
start_job (struct filter *f, uint64_t connection, const struct copy_source *sources, struct refusal *refusal)
{
  struct copy_job *job = calloc (1, sizeof *job);
  pthread_attr_t attr;
  pthread_t thread;

  if (!job)
    return refuse (refusal, REFUSED_INTERNAL, "no memory");
  job->f = f;
  memcpy (job->sources, sources, f->disk_count * sizeof *sources);
  pthread_mutex_init (&job->mu, NULL);

  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (!f->link || f->connection != connection || f->stopping) {
    free (job);
    return refuse_stale (f, connection, refusal);
  }
  job->link = f->link;
  pthread_attr_init (&attr);
  pthread_attr_setdetachstate (&attr, PTHREAD_CREATE_DETACHED);
  int r = pthread_create (&thread, &attr, coordinator_main, job);
  pthread_attr_destroy (&attr);
  if (r != 0) {
    free (job);
    return refuse (refusal, REFUSED_INTERNAL, "no thread for the copy: %s", strerror (r));
  }
  /* The thread's first step takes mu: it sees what is set here. */
  __atomic_fetch_add (&f->link->refs, 1, __ATOMIC_RELAXED);
  f->copy = job;
  f->copy_started_us = now_us ();
  f->copy_total_bytes = granules_to_copy (f) * GRANULE_BYTES;
  f->standing.phase = PHASE_COPYING;
  text_copy (f->cause, sizeof f->cause, "copying");
  filter_changed_locked (f);
  return 0;
}

int
resync_copy (struct filter *f, uint64_t connection, const struct copy_source *sources, uint64_t *merged_bytes,
             struct refusal *refusal)
{
  bool needed[DISKS_MAX];

  if (copy_is_allowed (f, connection, sources, needed, refusal) == -1
      || merge_books (f, sources, needed, merged_bytes, refusal) == -1)
    return -1;
  {
    /* What the books cover stays covered, even when the link is lost by now. */
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    for (unsigned i = 0; i < f->disk_count; i++)
      if ((int64_t) sources[i].covers > f->disks[i].book_covers)
        f->disks[i].book_covers = (int64_t) sources[i].covers;
    filter_changed_locked (f);
  }
  return start_job (f, connection, sources, refusal);
}

void
resync_cancel_locked (struct filter *f)
{
  struct copy_job *job = f->copy;

  if (!job)
    return;
  LOCK_FOR_CURRENT_SCOPE (&job->mu);
  __atomic_store_n (&job->cancelled, true, __ATOMIC_RELEASE);
  for (unsigned i = 0; i < COPIERS; i++)
    if (job->readers[i])
      f->source->ops->abandon (job->readers[i]);
}

int
resync_wait_ended (struct filter *f, int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);

  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  while (f->copy)
    if (pthread_cond_clockwait (&f->changed, &f->mu, CLOCK_MONOTONIC, &until) == ETIMEDOUT && f->copy) {
      errno = ETIMEDOUT;
      return -1;
    }
  return 0;
}
