/* The copier: one of a few threads of a copy job.
 *
 * It is handed windows of a disk and brings what is to be copied in them to the mirror:
 *   - what the source reports as a hole or zeroes becomes a zero request, and nothing at all where the
 *     mirror is known to be zero already: a sparse mirror stays sparse
 *   - data is read without a lock (a guest write must never wait for the source), then its range is
 *     locked and only sectors that are not fresh are sent; granules that read as zero as above
 * What is said about zeroes, on both sides, is asked before the range is locked.  That is safe for the
 * same reason as reading early: anything written since then came through the filter, so it is fresh.
 *
 * A granule leaves the `copy` set when its last piece was answered, and becomes clean with a later flush
 * of the same connection (book.h).
 */
#include "copier.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "scope.h"
#include "text.h"

#define WINDOW_GRANULES 1024u /* 64 MiB: the unit that is handed out, and the longest extent that is asked for */
#define PIECE_GRANULES 16u    /* 1 MiB: read and sent in one request, under one range lock */
#define ZERO_GRANULES 64u     /* 4 MiB: zeroed under one range lock */
#define SOURCE_TIMEOUT_MS 30000

/* The last answer about zeroes of one side. */
struct extent {
  uint64_t offset;
  uint64_t length;
  bool zero;
};

struct copier {
  struct copy_job *job;
  struct filter *f;
  struct disk *d;
  struct source_reader *reader;
  unsigned slot;
  uint8_t *buf;
  uint64_t window_end; /* bytes */
  struct extent source_extent, mirror_extent;
};

static int
source_failed (struct copier *c, const char *doing)
{
  char cause[REASON_SIZE];

  text_format (cause, sizeof cause, "the source cannot be read (%s %s: %s)", doing, c->d->config->name,
               strerror (errno));
  if (!copy_cancelled (c->job))
    filter_lose_link (c->f, c->job->link, cause);
  return -1;
}

static int
mirror_failed (struct copier *c, const char *doing)
{
  filter_mirror_failed (c->f, c->job->link, c->d, doing, errno);
  return -1;
}

static uint64_t
clip (const struct copier *c, uint64_t offset, uint64_t count)
{
  uint64_t left = c->d->config->size_bytes - offset;

  return count < left ? count : left;
}

static bool
covers (const struct extent *e, uint64_t offset)
{
  return offset >= e->offset && offset - e->offset < e->length;
}

/* How much from `offset` on the source has as zeroes, or as data. */
static int
source_extent (struct copier *c, uint64_t offset, bool *zero, uint64_t *length)
{
  struct extent *e = &c->source_extent;

  if (!covers (e, offset)) {
    e->offset = offset;
    e->length = 0;
    if (c->f->source->ops->zero_extent (c->reader, c->window_end - offset, offset, in_ms (SOURCE_TIMEOUT_MS), &e->zero,
                                        &e->length)
        == -1)
      return source_failed (c, "asking for holes of");
  }
  *zero = e->zero;
  *length = e->offset + e->length - offset;
  return 0;
}

static int
mirror_extent (struct copier *c, uint64_t offset, bool *zero, uint64_t *length)
{
  struct extent *e = &c->mirror_extent;

  if (!covers (e, offset)) {
    e->offset = offset;
    e->length = 0;
    if (c->f->mirror->ops->zero_extent (c->job->link->session, c->d->index, c->window_end - offset, offset,
                                        now_us () + filter_stall_us (c->f), &e->zero, &e->length)
        == -1)
      return mirror_failed (c, "asking for holes of");
  }
  *zero = e->zero;
  *length = e->offset + e->length - offset;
  return 0;
}

static int
lock_range (struct copier *c, struct range_node *node, uint64_t offset, uint64_t count)
{
  while (!copy_cancelled (c->job))
    if (range_lock_take (&c->d->ranges, node, offset, count, now_us () + filter_stall_us (c->f)) == 0)
      return 0;
  return -1;
}

static int
send_data (struct copier *c, const uint8_t *buf, uint64_t offset, uint64_t count)
{
  COUNT (c->f, resync_sent_bytes, count);
  if (c->f->mirror->ops->pwrite (c->job->link->session, c->d->index, buf, (uint32_t) count, offset, false,
                                 now_us () + filter_stall_us (c->f))
      == -1)
    return mirror_failed (c, "copying to");
  return 0;
}

static int
send_zeroes (struct copier *c, uint64_t offset, uint64_t count)
{
  COUNT (c->f, resync_zero_bytes, count);
  if (c->f->mirror->ops->zero (c->job->link->session, c->d->index, count, offset, false,
                               now_us () + filter_stall_us (c->f))
      == -1)
    return mirror_failed (c, "zeroing");
  return 0;
}

/* Under the range lock: bring offset..+count to the mirror, data from `buf` or (NULL) zeroes, without the
   fresh sectors. */
static int
send_not_fresh (struct copier *c, const uint8_t *buf, uint64_t offset, uint64_t count)
{
  const struct fresh_map *map = &c->job->link->fresh[c->d->index];
  bool fresh;

  for (uint64_t run; count > 0; offset += run, count -= run, buf = buf ? buf + run : NULL) {
    run = fresh_map_run (map, offset, count, &fresh);
    if (fresh)
      COUNT (c->f, resync_skipped_fresh_bytes, run);
    else if ((buf ? send_data (c, buf, offset, run) : send_zeroes (c, offset, run)) == -1)
      return -1;
  }
  return 0;
}

/* `count` granules from `first` on are zero on the source. */
static int
copy_zeroes (struct copier *c, uint64_t first, uint64_t count)
{
  while (count > 0 && !copy_cancelled (c->job)) {
    uint64_t offset = first * GRANULE_BYTES, length = 0, step;
    bool zero = false;

    if (mirror_extent (c, offset, &zero, &length) == -1)
      return -1;
    if (zero && length >= clip (c, offset, GRANULE_BYTES)) {
      step = length >= clip (c, offset, count * GRANULE_BYTES) ? count : length / GRANULE_BYTES;
      book_copied (&c->d->book, first, step, c->job->link->connection);
    } else {
      struct range_node range;
      step = count < ZERO_GRANULES ? count : ZERO_GRANULES;
      if (!zero && length >= GRANULE_BYTES && length / GRANULE_BYTES < step)
        step = length / GRANULE_BYTES;
      uint64_t bytes = clip (c, offset, step * GRANULE_BYTES);
      if (lock_range (c, &range, offset, bytes) == -1)
        return -1;
      int r = send_not_fresh (c, NULL, offset, bytes);
      if (r == 0)
        book_copied (&c->d->book, first, step, c->job->link->connection);
      range_lock_release (&c->d->ranges, &range);
      if (r == -1)
        return -1;
    }
    first += step;
    count -= step;
  }
  return copy_cancelled (c->job) ? -1 : 0;
}

static bool
all_zero (const uint8_t *buf, size_t count)
{
  return buf[0] == 0 && memcmp (buf, buf + 1, count - 1) == 0;
}

/* At most PIECE_GRANULES that have data on the source, at least in part. */
static int
copy_data (struct copier *c, uint64_t first, uint64_t count)
{
  uint64_t offset = first * GRANULE_BYTES, bytes = clip (c, offset, count * GRANULE_BYTES);
  uint64_t run;
  struct range_node range;

  if (c->f->source->ops->pread (c->reader, c->buf, (uint32_t) bytes, offset, in_ms (SOURCE_TIMEOUT_MS)) == -1)
    return source_failed (c, "reading");
  COUNT (c->f, resync_read_bytes, bytes);
  for (uint64_t done = 0; done < count; done += run) {
    const uint8_t *buf = c->buf + done * GRANULE_BYTES;
    uint64_t at = offset + done * GRANULE_BYTES;
    bool zero = all_zero (buf, (size_t) clip (c, at, GRANULE_BYTES));

    for (run = 1; done + run < count; run++)
      if (all_zero (buf + run * GRANULE_BYTES, (size_t) clip (c, at + run * GRANULE_BYTES, GRANULE_BYTES)) != zero)
        break;
    if (zero) {
      if (copy_zeroes (c, first + done, run) == -1)
        return -1;
      continue;
    }
    uint64_t length = clip (c, at, run * GRANULE_BYTES);
    if (lock_range (c, &range, at, length) == -1)
      return -1;
    int r = send_not_fresh (c, buf, at, length);
    if (r == 0)
      book_copied (&c->d->book, first + done, run, c->job->link->connection);
    range_lock_release (&c->d->ranges, &range);
    if (r == -1)
      return -1;
  }
  return 0;
}

/* `count` granules from `first` on, all to be copied, inside the window. */
static int
copy_run (struct copier *c, uint64_t first, uint64_t count)
{
  while (count > 0 && !copy_cancelled (c->job)) {
    uint64_t offset = first * GRANULE_BYTES, length = 0, step;
    bool zero = false;

    if (source_extent (c, offset, &zero, &length) == -1)
      return -1;
    if (zero && length >= clip (c, offset, GRANULE_BYTES)) {
      step = length >= clip (c, offset, count * GRANULE_BYTES) ? count : length / GRANULE_BYTES;
      if (copy_zeroes (c, first, step) == -1)
        return -1;
    } else {
      step = zero ? 1 : granules_for_size (length);
      step = step > PIECE_GRANULES ? PIECE_GRANULES : step;
      step = step > count ? count : step;
      if (copy_data (c, first, step) == -1)
        return -1;
    }
    first += step;
    count -= step;
  }
  return copy_cancelled (c->job) ? -1 : 0;
}

/* The next window that has something to copy. */
static bool
next_window (struct copy_job *job, unsigned *disk, uint64_t *first, uint64_t *end)
{
  LOCK_FOR_CURRENT_SCOPE (&job->mu);
  while (!job->cancelled && job->cursor_disk < job->f->disk_count) {
    struct disk *d = &job->f->disks[job->cursor_disk];
    uint64_t run;
    uint64_t next = book_next_to_copy (&d->book, job->cursor_granule, 1, &run);
    if (next == GRANULE_NONE) {
      job->cursor_disk++;
      job->cursor_granule = 0;
      continue;
    }
    *disk = job->cursor_disk;
    *first = next;
    *end = (next / WINDOW_GRANULES + 1) * WINDOW_GRANULES;
    if (*end > d->map.granules)
      *end = d->map.granules;
    job->cursor_granule = *end;
    return true;
  }
  return false;
}

static void
drop_reader (struct copier *c)
{
  if (!c->reader)
    return;
  {
    LOCK_FOR_CURRENT_SCOPE (&c->job->mu);
    c->job->readers[c->slot] = NULL;
  }
  c->f->source->ops->close (c->reader);
  c->reader = NULL;
}

static int
use_disk (struct copier *c, unsigned disk)
{
  const struct copy_source *from = &c->job->sources[disk];
  char fault[MIRROR_FAULT_SIZE], cause[REASON_SIZE];

  c->source_extent.length = c->mirror_extent.length = 0;
  if (c->d == &c->f->disks[disk])
    return 0;
  drop_reader (c);
  c->d = &c->f->disks[disk];
  c->reader = c->f->source->ops->open (c->f->source, from->socket, from->export_name, NULL, c->d->config->size_bytes,
                                       in_ms (SOURCE_TIMEOUT_MS), fault);
  if (!c->reader) {
    text_format (cause, sizeof cause, "the source cannot be read (%s: %s)", c->d->config->name, fault);
    if (!copy_cancelled (c->job))
      filter_lose_link (c->f, c->job->link, cause);
    return -1;
  }
  LOCK_FOR_CURRENT_SCOPE (&c->job->mu);
  c->job->readers[c->slot] = c->reader;
  if (c->job->cancelled)
    c->f->source->ops->abandon (c->reader);
  return 0;
}

void
copier_run (struct copy_job *job, unsigned slot)
{
  struct copier c = { .job = job, .f = job->f, .slot = slot };
  unsigned disk;
  uint64_t at, end, count;

  c.buf = malloc ((size_t) PIECE_GRANULES * GRANULE_BYTES);
  if (!c.buf)
    filter_lose_link (c.f, job->link, "no memory for the copy");
  while (c.buf && next_window (job, &disk, &at, &end)) {
    if (use_disk (&c, disk) == -1)
      break;
    c.window_end = clip (&c, 0, end * GRANULE_BYTES);
    for (; (at = book_next_to_copy (&c.d->book, at, end - at, &count)) < end; at += count)
      if (count = at + count > end ? end - at : count, copy_run (&c, at, count) == -1)
        goto out;
  }
out:
  drop_reader (&c);
  free (c.buf);
}
