#include "commands.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "clock.h"
#include "scope.h"
#include "tee.h"
#include "text.h"

/* Stops forwarding in good order when it was MIRRORING: requests under way end, everything is flushed, and
   with `stamp` the superblock says when.  The mirror then is what the guest had at that moment.  In any
   other phase, or when the mirror fails meanwhile, the link is just lost. */
static void
stop_forwarding (struct filter *f, const char *cause, bool stamp)
{
  int64_t deadline_us = now_us () + filter_stall_us (f);
  char fault[MIRROR_FAULT_SIZE];
  struct superblock block;
  struct link *link = NULL;

  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (f->standing.phase == PHASE_MIRRORING) {
      link = f->link;
      __atomic_fetch_add (&link->refs, 1, __ATOMIC_RELAXED);
      f->saved.last_sync_unix_ms = (uint64_t) unix_ms ();
      f->standing.phase = PHASE_RESTING; /* from here on writes are only marked dirty */
    }
  }
  if (link) {
    bool flushed = link_wait_unused (link, deadline_us) == 0 && filter_flush_unflushed (f, link, deadline_us) == 0;
    if (flushed && stamp
        && filter_check_superblock (f, link->session, &block, deadline_us, fault) == VERDICT_OURS) {
      block.last_sync_unix_ms = (uint64_t) unix_ms ();
      if (filter_stamp (f, link->session, &block, deadline_us) == -1)
        filter_mirror_failed (f, link, NULL, "writing the superblock", errno);
    }
    link_put (link);
  }
  filter_lose_link (f, NULL, cause);
}

int
command_barrier (struct filter *f, struct refusal *refusal)
{
  int64_t arrival_us = now_us ();
  int64_t deadline_us = arrival_us + filter_stall_us (f);
  enum phase phase;
  struct link *link = link_get (f, &phase);

  if (!link || phase != PHASE_MIRRORING) {
    if (link)
      link_put (link);
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    return refuse (refusal, REFUSED_WRONG_STATE, "the state is %s", state_name (state_of (&f->standing)));
  }
  int r = 0;
  for (unsigned i = 0; r == 0 && i < f->disk_count; i++) {
    struct book_flush flush;
    r = tee_wait_requests (&f->disks[i], arrival_us, deadline_us);
    if (r == -1)
      break;
    book_flush_begin (&f->disks[i].book, &flush, link->connection);
    r = f->mirror->ops->flush (link->session, i, deadline_us);
    int err = errno;
    book_flush_end (&f->disks[i].book, &flush, r == 0);
    if (r == -1)
      filter_mirror_failed (f, link, &f->disks[i], "flushing", err);
  }
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  bool same = f->link == link;
  if (r == -1 || !same)
    refuse (refusal, REFUSED_MIRROR, "the mirror was lost during the barrier: %.180s", f->cause);
  link_put_locked (link);
  return r == 0 && same ? 0 : -1;
}

static int
refuse_terminal_locked (const struct filter *f, struct refusal *refusal)
{
  return refuse (refusal, REFUSED_WRONG_STATE, "the state is %s: %.180s", state_name (state_of (&f->standing)),
                 f->cause);
}

int
command_pause (struct filter *f, const char *reason, struct refusal *refusal)
{
  char cause[REASON_SIZE];

  text_format (cause, sizeof cause, "paused: %s", reason);
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (state_is_terminal (&f->standing))
      return refuse_terminal_locked (f, refusal);
    f->standing.paused = true;
    text_copy (f->saved.paused, sizeof f->saved.paused, reason);
  }
  stop_forwarding (f, cause, true);
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    text_copy (f->cause, sizeof f->cause, cause);
    filter_changed_locked (f);
  }
  return filter_store_state (f) == 0 ? 0 : refuse (refusal, REFUSED_INTERNAL, "the state file cannot be written");
}

int
command_resume (struct filter *f, struct refusal *refusal)
{
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (state_is_terminal (&f->standing))
      return refuse_terminal_locked (f, refusal);
    if (!f->standing.paused)
      return 0;
    f->standing.paused = false;
    f->saved.paused[0] = '\0';
    text_copy (f->cause, sizeof f->cause, "resumed: waiting for a resync");
    filter_changed_locked (f);
  }
  return filter_store_state (f) == 0 ? 0 : refuse (refusal, REFUSED_INTERNAL, "the state file cannot be written");
}

int
command_detach (struct filter *f, struct refusal *refusal)
{
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (f->standing.detached)
      return 0;
    if (state_is_terminal (&f->standing))
      return refuse_terminal_locked (f, refusal);
  }
  stop_forwarding (f, "detached", true);
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    if (f->standing.fenced) /* found out while stamping */
      return refuse_terminal_locked (f, refusal);
    f->standing.detached = f->saved.detached = true;
    f->standing.mirror_connected = false;
    text_copy (f->cause, sizeof f->cause, "detached");
    filter_changed_locked (f);
  }
  return filter_store_state (f) == 0 ? 0 : refuse (refusal, REFUSED_INTERNAL, "the state file cannot be written");
}

int
command_fence_now (struct filter *f, const char *reason, struct refusal *refusal)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  if (f->standing.failed)
    return refuse_terminal_locked (f, refusal);
  filter_lose_link_locked (f, reason);
  f->standing.failed_over = true;
  f->standing.mirror_connected = false;
  text_copy (f->saved.failed_over, sizeof f->saved.failed_over, reason);
  text_copy (f->cause, sizeof f->cause, reason);
  log_line (LOG_INFO, "state=FAILED_OVER reason=\"%s\"", reason);
  filter_changed_locked (f);
  return 0;
}

int
command_fence_durably (struct filter *f, struct refusal *refusal)
{
  if (filter_store_state (f) == -1)
    return refuse (refusal, REFUSED_INTERNAL, "the state file cannot be written: the fence is not durable");
  if (link_wait_all_closed (f, now_us () + filter_stall_us (f)) == -1)
    return refuse (refusal, REFUSED_MIRROR, "requests of the last mirror connection have not ended yet; fence again");
  return 0;
}
