/* The resync protocol (DESIGN 3, docs/control-protocol.md; checked as a model in model/resync.pml).
 *
 *   begin   a new mirror connection; the superblock is judged and its `consistent` flag durably cleared;
 *           from its return on guest writes are forwarded and their sectors marked fresh
 *   (the control plane drains the source and takes its books)
 *   copy    merges the books durably into the dirty maps, then a coordinator thread with a few copiers
 *           brings each granule that is to be copied from the source to the mirror
 *   end     nothing left: flush, generation + 1 in filter.state, stamp, MIRRORING
 *
 * A guest write never waits for a read of the source: a granule is read without any lock, and only then
 * its range is locked and what is not fresh is sent.
 */
#pragma once

#include "filter.h"

#define COPIERS 4

/* Why a command was not done; classes as in docs/control-protocol.md. */
enum refusal_class { REFUSED_BAD_REQUEST, REFUSED_WRONG_STATE, REFUSED_STALE, REFUSED_MIRROR, REFUSED_INTERNAL };

struct refusal {
  enum refusal_class class;
  char message[REASON_SIZE];
};

struct copy_source {
  char socket[SOCKET_PATH_SIZE];
  char export_name[EXPORT_NAME_SIZE];
  char bitmap[EXPORT_NAME_SIZE]; /* "": none */
  uint64_t covers;
};

int resync_begin (struct filter *f, uint64_t *connection, struct refusal *refusal);
/* One source per disk, in the order of the disks. */
int resync_copy (struct filter *f, uint64_t connection, const struct copy_source *sources, uint64_t *merged_bytes,
                 struct refusal *refusal);

void resync_cancel_locked (struct filter *f);
int resync_wait_ended (struct filter *f, int64_t deadline_us);

int refuse (struct refusal *refusal, enum refusal_class class, const char *fmt, ...)
  __attribute__ ((format (printf, 3, 4)));
