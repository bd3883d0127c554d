/* The mirror filter of one protected VM.
 *
 * Threads: the front end's workers (tee.h) bring guest requests to the mirror and wait for it
 * themselves, so that no request changes threads; the probe looks for a lost mirror; the heartbeat
 * flushes every second and notices a mirror that died while the guest was quiet; a resync has a
 * coordinator and a few copiers; each control client has a thread; one tells the supervisor that all
 * is well.
 *
 * Locks, in the order in which they are taken; none is held over I/O but the first two, which no guest
 * request and no `status` ever takes:
 *   operation   one state-changing command at a time (a flag, so that waiting for it is bounded)
 *   state_io    order of rewrites of filter.state
 *   mu          everything marked [mu]
 *   disk.clients_mu, book.mu, range_lock.mu   leaves
 *
 * A *link* is a mirror session with its number and its fresh maps.  f->link is set while guest writes
 * are forwarded.  Whoever uses it holds a reference; the last one closes the session.  Losing the link
 * (filter_lose_link) is one step under `mu`: the phase becomes RESTING, everything unflushed or in
 * flight becomes dirty, the number grows, and every waiting thread wakes up.
 */
#pragma once

#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "book.h"
#include "config.h"
#include "dirty_map.h"
#include "fresh_map.h"
#include "histogram.h"
#include "log.h"
#include "mirror_dev.h"
#include "range_lock.h"
#include "source_dev.h"
#include "state_file.h"
#include "states.h"

#define WATCHERS_MAX 24
#define FLUSH_INTERVAL_MS 1000
#define HEARTBEAT_INTERVAL_MS 2000

struct filter;
struct copy_job;

struct link {
  struct filter *filter;
  struct mirror_session *session;
  uint64_t connection;
  int refs; /* atomic */
  struct fresh_map fresh[DISKS_MAX];
};

/* A guest request under way; lives on the worker's stack. */
struct request {
  int64_t arrival_us;
  struct request *prev, *next;
};

struct disk {
  struct filter *filter;
  unsigned index;
  const struct disk_config *config;
  struct dirty_map map;
  struct book book;
  struct range_lock ranges;

  pthread_mutex_t clients_mu; /* protects requests and request_count */
  pthread_cond_t request_ended; /* signalled while request_waiters > 0 */
  unsigned request_waiters;
  bool held; /* [clients_mu] the process is about to end */
  struct request *requests;
  unsigned request_count;

  uint64_t client_connection; /* [mu] of the newest client; atomic reads elsewhere */
  bool client_connected;      /* [mu] */
  int64_t book_covers;        /* [mu] newest client connection that a merged book covers; -1: none */
};

struct counters { /* atomic */
  uint64_t writes, write_bytes, zeroes, zero_bytes, flushes, mirror_errors, mirror_timeouts, reconnects, resync_read_bytes,
    resync_sent_bytes, resync_zero_bytes, resync_skipped_fresh_bytes;
};

struct filter {
  const struct config *config;
  struct mirror_dev *mirror;
  struct source_dev *source;
  int64_t started_us;
  char state_path[PATH_MAX];
  struct disk disks[DISKS_MAX];
  unsigned disk_count;
  struct counters counters;
  struct histogram write_latency, flush_latency;

  pthread_mutex_t state_io;

  pthread_mutex_t mu;
  pthread_cond_t changed;          /* with mu: phase, pause, stop */
  struct standing standing;        /* [mu] */
  struct state_file saved;         /* [mu] written by filter_store_state */
  struct link *link;               /* [mu] */
  uint64_t connection;             /* [mu] number of the current or next link */
  char cause[REASON_SIZE];         /* [mu] why nothing is forwarded, or why this state */
  char probe_fault[REASON_SIZE];   /* [mu] what the last probe found wrong; "": nothing */
  bool consistent;                 /* [mu] the superblock's flag as last seen or written */
  uint64_t superblock_sequence;    /* [mu] as last seen or written */
  bool quiescing;                  /* atomic: somebody waits for a link's users */
  unsigned live_links;             /* [mu] sessions that are not closed yet */
  bool operating;                  /* [mu] a state-changing command is under way */
  bool stopping;                   /* [mu] */
  struct copy_job *copy;           /* [mu] the running one */
  uint64_t copy_total_bytes;       /* [mu] */
  int64_t copy_started_us;         /* [mu] */

  pthread_mutex_t watchers_mu; /* a leaf: taken under mu */
  int watchers[WATCHERS_MAX];  /* eventfds of subscribers, -1: free */

  pthread_t probe_thread, heartbeat_thread;
  bool threads_started;
  unsigned copiers; /* threads of a copy; COPIERS, or fewer for a test that must be the same each time */
};

/* Opens dirty maps and state file.  Never fails for what they hold: then the state is FAILED, with the
   reason.  NULL only without memory. */
struct filter *filter_new (const struct config *config, struct mirror_dev *mirror, struct source_dev *source);
int filter_start_threads (struct filter *f);
/* The end in good order, once: requests that come from now on are never answered (the source's hypervisor
   sends them again, or its book has them), the others end, what can be flushed is flushed, the dirty maps
   are on disk and the stop is marked as clean.  False: a thread of its own hangs at the mirror, so that
   nothing may be freed any more. */
bool filter_stop (struct filter *f);
/* After filter_stop has returned true, and when no request and no control client is left. */
void filter_free (struct filter *f);

/* One state-changing command at a time; -1 with ETIMEDOUT. */
int filter_begin_operation (struct filter *f, int64_t deadline_us);
void filter_end_operation (struct filter *f);

#define COUNT(f, name, n) __atomic_fetch_add (&(f)->counters.name, (uint64_t) (n), __ATOMIC_RELAXED)

static inline int64_t
filter_stall_us (const struct filter *f)
{
  return (int64_t) f->config->stall_ms * 1000;
}

/* -- links (link.c) -- */

/* Takes `session` over; NULL without memory. */
struct link *link_new (struct filter *f, struct mirror_session *session);
/* The link that guest writes are forwarded on, with a reference and the phase; NULL: mark dirty only. */
struct link *link_get (struct filter *f, enum phase *phase);
void link_put (struct link *link);
void link_put_locked (struct link *link);
/* Waits until every session is closed; -1 with ETIMEDOUT. */
int link_wait_all_closed (struct filter *f, int64_t deadline_us);
/* Waits until only the caller and f->link hold it. */
int link_wait_unused (struct link *link, int64_t deadline_us);
/* The current link failed (`link` NULL: whichever it is).  Nothing happens when it is not current any more. */
void filter_lose_link (struct filter *f, struct link *link, const char *cause);
/* As above, the cause made from what was being done and errno. */
void filter_mirror_failed (struct filter *f, struct link *link, const struct disk *disk, const char *doing, int err);
/* A write became dirty without being forwarded: a link on which the books are merged already cannot stay. */
void filter_write_missed (struct filter *f, struct link *link);

/* -- facts (filter.c); callers hold nothing -- */

/* Rewrites filter.state; a failure makes the state FAILED. */
int filter_store_state (struct filter *f);
void filter_fail (struct filter *f, const char *why);
void filter_fence_off (struct filter *f, const char *why);
/* Callers hold mu. */
void filter_changed_locked (struct filter *f);
void filter_lose_link_locked (struct filter *f, const char *cause);
bool disk_needs_book_locked (const struct disk *d);

/* -- the mirror's superblock (probe.c) -- */

enum verdict { VERDICT_OURS, VERDICT_TROUBLE, VERDICT_FENCED };
/* Reads and judges it; for VERDICT_FENCED the state is FENCED when it returns. */
enum verdict filter_check_superblock (struct filter *f, struct mirror_session *s, struct superblock *block,
                                      int64_t deadline_us, char *fault);
/* Rewrites it; durable when it returns. */
int filter_stamp (struct filter *f, struct mirror_session *s, struct superblock *block, int64_t deadline_us);

/* Flushes every disk that has something unflushed (heartbeat.c); -1: the link is lost. */
int filter_flush_unflushed (struct filter *f, struct link *link, int64_t deadline_us);

void *probe_main (void *filter);
void *heartbeat_main (void *filter);
