/* The state of a protection is never stored: it follows from a few facts, so that no two of them can
 * disagree.  The table is docs/control-protocol.md, "States". */
#pragma once

#include <stdbool.h>

/* Numbers as in layout.py (VM_STATUS_STATE_*). */
enum state {
  STATE_DETACHED = 0,
  STATE_SYNCING = 1,
  STATE_MIRRORING = 2,
  STATE_DEGRADED = 3,
  STATE_RESYNCING = 4,
  STATE_FENCED = 5,
  STATE_FAILED_OVER = 6,
  STATE_FAILED = 7,
};

enum phase {
  PHASE_RESTING,   /* nothing is forwarded */
  PHASE_BEGUN,     /* after resync-begin: writes are forwarded, all are marked fresh */
  PHASE_COPYING,   /* the books are merged: the copier runs */
  PHASE_MIRRORING, /* nothing is left to copy */
};

struct standing {
  bool failed;
  bool failed_over;
  bool fenced;
  bool detached;
  bool synced; /* has been MIRRORING */
  bool paused;
  bool mirror_connected;
  enum phase phase;
};

enum state state_of (const struct standing *standing);
const char *state_name (enum state state);
/* For ever, as far as this process goes: no resync can begin. */
bool state_is_terminal (const struct standing *standing);
bool state_needs_resync (const struct standing *standing);
