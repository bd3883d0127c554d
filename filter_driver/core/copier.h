/* The copier: brings the granules of one job from the source to the mirror (copier.c), and the job's
 * life, which resync.c runs. */
#pragma once

#include "resync.h"

struct copy_job {
  struct filter *f;
  struct link *link; /* with a reference */
  struct copy_source sources[DISKS_MAX];
  uint64_t copy_granules_at_start;

  pthread_mutex_t mu;   /* a leaf; may be taken under filter.mu */
  bool cancelled;       /* [mu] written; atomic reads */
  unsigned cursor_disk; /* [mu] the next window to be handed out */
  uint64_t cursor_granule;
  struct source_reader *readers[COPIERS]; /* [mu] for waking them; each belongs to one copier */
};

static inline bool
copy_cancelled (const struct copy_job *job)
{
  return __atomic_load_n (&job->cancelled, __ATOMIC_ACQUIRE);
}

/* Copies windows until none is left or the job is cancelled; then the link is lost with the cause, or
   somebody else has lost it.  `slot`: which of the job's copiers this is. */
void copier_run (struct copy_job *job, unsigned slot);
