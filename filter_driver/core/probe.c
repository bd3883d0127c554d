/* The mirror's superblock: whose is it, and who is newest?  And the probe: while nothing is forwarded it
 * looks for the mirror, 100 ms to 5 s apart, for ever, and so makes `needs_resync` true.
 *
 * Rules (I-5).  Another UUID, the promoted flag, or a generation above ours: this filter never writes
 * again.  A generation below the one that we have stamped: the mirror was put back to an older copy, which
 * the dirty maps do not describe: everything is copied.  A generation below ours that we never stamped is
 * the crash between filter.state and the stamp: all is well.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "clock.h"
#include "filter.h"
#include "scope.h"
#include "text.h"

#define BACK_OFF_FIRST_MS 100
#define BACK_OFF_MAX_MS 5000
#define PROBE_AGAIN_MS 1000 /* of a mirror that answered */

static bool
sizes_differ (const struct filter *f, const struct superblock *b, char *fault)
{
  if (b->disk_count != f->disk_count) {
    text_format (fault, MIRROR_FAULT_SIZE, "the mirror's superblock names %u disks, the protection has %u",
                 b->disk_count, f->disk_count);
    return true;
  }
  for (unsigned i = 0; i < f->disk_count; i++)
    if (b->disk_size_bytes[i] != f->disks[i].config->size_bytes) {
      text_format (fault, MIRROR_FAULT_SIZE, "the mirror's superblock says %" PRIu64 " bytes for disk%u, the disk has %" PRIu64,
                   b->disk_size_bytes[i], i, f->disks[i].config->size_bytes);
      return true;
    }
  return false;
}

enum verdict
filter_check_superblock (struct filter *f, struct mirror_session *s, struct superblock *block, int64_t deadline_us,
                         char *fault)
{
  uint8_t file[SUPERBLOCK_FILE_BYTES];
  bool older = false;
  uint64_t generation;

  if (f->mirror->ops->super_read (s, file, deadline_us) == -1) {
    if (errno == ETIMEDOUT)
      text_copy (fault, MIRROR_FAULT_SIZE, "the mirror did not answer (reading its superblock)");
    else
      text_format (fault, MIRROR_FAULT_SIZE, "the mirror's superblock cannot be read: %s", strerror (errno));
    return VERDICT_TROUBLE;
  }
  if (superblock_decode (file, block, fault, MIRROR_FAULT_SIZE) == -1)
    return VERDICT_TROUBLE;
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    generation = f->saved.generation;
    older = block->generation < f->saved.stamped_generation;
  }
  fault[0] = '\0';
  if (memcmp (block->uuid, f->config->protection, sizeof block->uuid) != 0) {
    char other[UUID_TEXT_SIZE];
    uuid_format (block->uuid, other);
    text_format (fault, MIRROR_FAULT_SIZE, "the mirror belongs to another protection (%s)", other);
  } else if (block->promoted)
    text_format (fault, MIRROR_FAULT_SIZE, "the mirror was promoted (generation %" PRIu64 "): the VM runs there",
                 block->generation);
  else if (block->generation > generation)
    text_format (fault, MIRROR_FAULT_SIZE, "the mirror has generation %" PRIu64 ", higher than ours (%" PRIu64 ")",
                 block->generation, generation);
  if (fault[0]) {
    filter_fence_off (f, fault);
    return VERDICT_FENCED;
  }
  if (sizes_differ (f, block, fault))
    return VERDICT_TROUBLE;
  if (older) {
    log_line (LOG_WARNING, "reason=\"the mirror is an older copy (generation %" PRIu64 "): all disks are copied again\"",
              block->generation);
    filter_lose_link (f, NULL, "the mirror was replaced by an older copy of itself");
    for (unsigned i = 0; i < f->disk_count; i++)
      book_miss_all (&f->disks[i].book);
    {
      LOCK_FOR_CURRENT_SCOPE (&f->mu);
      f->saved.stamped_generation = block->generation;
    }
    /* Only once the maps are durably dirty may the older generation count as known. */
    for (unsigned i = 0; i < f->disk_count; i++)
      if (dirty_map_sync (&f->disks[i].map) == -1)
        filter_fail (f, "the dirty map cannot be written");
    filter_store_state (f);
  }
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  f->consistent = block->consistent;
  f->superblock_sequence = block->sequence;
  return VERDICT_OURS;
}

int
filter_stamp (struct filter *f, struct mirror_session *s, struct superblock *block, int64_t deadline_us)
{
  uint8_t slot[SUPERBLOCK_SLOT_BYTES];

  block->sequence++;
  block->updated_unix_ms = (uint64_t) unix_ms ();
  text_copy (block->writer, sizeof block->writer, "filter");
  text_copy (block->vm_name, sizeof block->vm_name, f->config->vm);
  uint64_t offset = superblock_encode (block, slot);
  if (f->mirror->ops->super_write (s, slot, sizeof slot, offset, deadline_us) == -1)
    return -1;
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  f->consistent = block->consistent;
  f->superblock_sequence = block->sequence;
  return 0;
}

/* One look at the mirror. */
static bool
probe_once (struct filter *f, char *fault)
{
  int64_t deadline_us = now_us () + filter_stall_us (f);
  struct superblock block;
  struct mirror_session *s = f->mirror->ops->open (f->mirror, true, deadline_us, fault);

  if (!s)
    return false;
  enum verdict verdict = filter_check_superblock (f, s, &block, deadline_us, fault);
  f->mirror->ops->close (s);
  return verdict == VERDICT_OURS;
}

static bool
wants_probe_locked (const struct filter *f)
{
  return !state_is_terminal (&f->standing) && f->standing.phase == PHASE_RESTING;
}

static void
note_probe (struct filter *f, uint64_t connection, bool well, const char *fault, struct log_gate *gate)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (!wants_probe_locked (f) || f->connection != connection)
    return; /* it was overtaken by a resync-begin or a fence */
  if (!well && log_gate_open (gate, fault))
    log_line (LOG_WARNING, "state=%s mirror=unreachable reason=\"%s\"", state_name (state_of (&f->standing)), fault);
  if (f->standing.mirror_connected == well && strcmp (f->probe_fault, well ? "" : fault) == 0)
    return;
  if (well && !f->standing.mirror_connected)
    COUNT (f, reconnects, 1);
  f->standing.mirror_connected = well;
  text_copy (f->probe_fault, sizeof f->probe_fault, well ? "" : fault);
  filter_changed_locked (f);
}

void *
probe_main (void *opaque)
{
  struct filter *f = opaque;
  struct log_gate gate = { 0 };
  char fault[MIRROR_FAULT_SIZE];
  int64_t back_off_ms = BACK_OFF_FIRST_MS;
  uint64_t seen = 0;

  for (;;) {
    {
      LOCK_FOR_CURRENT_SCOPE (&f->mu);
      while (!f->stopping && !wants_probe_locked (f))
        pthread_cond_wait (&f->changed, &f->mu);
      if (f->stopping)
        return NULL;
      if (seen != f->connection)
        back_off_ms = BACK_OFF_FIRST_MS;
      seen = f->connection;
    }
    fault[0] = '\0';
    bool well = probe_once (f, fault);
    note_probe (f, seen, well, fault, &gate);

    int64_t pause_ms = well ? PROBE_AGAIN_MS : back_off_ms;
    back_off_ms = well ? BACK_OFF_FIRST_MS : back_off_ms * 2 > BACK_OFF_MAX_MS ? BACK_OFF_MAX_MS : back_off_ms * 2;
    struct timespec until = deadline_timespec (in_ms (pause_ms));
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    while (!f->stopping && f->connection == seen
           && pthread_cond_clockwait (&f->changed, &f->mu, CLOCK_MONOTONIC, &until) != ETIMEDOUT)
      continue;
  }
}
