#include "states.h"

#include "vm_layout.h"

_Static_assert ((int) STATE_DETACHED == VM_STATUS_STATE_DETACHED && (int) STATE_SYNCING == VM_STATUS_STATE_SYNCING
                  && (int) STATE_MIRRORING == VM_STATUS_STATE_MIRRORING
                  && (int) STATE_DEGRADED == VM_STATUS_STATE_DEGRADED
                  && (int) STATE_RESYNCING == VM_STATUS_STATE_RESYNCING && (int) STATE_FENCED == VM_STATUS_STATE_FENCED
                  && (int) STATE_FAILED_OVER == VM_STATUS_STATE_FAILED_OVER
                  && (int) STATE_FAILED == VM_STATUS_STATE_FAILED,
                "the numbers of states are layout.py's");

enum state
state_of (const struct standing *s)
{
  /* The harder fact wins: what forbids writing for ever stands before what only stops it now. */
  if (s->failed)
    return STATE_FAILED;
  if (s->failed_over)
    return STATE_FAILED_OVER;
  if (s->fenced)
    return STATE_FENCED;
  if (s->detached)
    return STATE_DETACHED;
  switch (s->phase) {
  case PHASE_MIRRORING:
    return STATE_MIRRORING;
  case PHASE_BEGUN:
  case PHASE_COPYING:
    return s->synced ? STATE_RESYNCING : STATE_SYNCING;
  case PHASE_RESTING:
    break;
  }
  return s->synced ? STATE_DEGRADED : STATE_SYNCING;
}

const char *
state_name (enum state state)
{
  static const char *const names[]
    = { "DETACHED", "SYNCING", "MIRRORING", "DEGRADED", "RESYNCING", "FENCED", "FAILED_OVER", "FAILED" };

  return names[state];
}

bool
state_is_terminal (const struct standing *s)
{
  return s->failed || s->failed_over || s->fenced || s->detached;
}

bool
state_needs_resync (const struct standing *s)
{
  return !state_is_terminal (s) && s->phase == PHASE_RESTING && !s->paused && s->mirror_connected;
}
