/* docs/control-protocol.md, "States", as a table. */
#include "check.h"
#include "states.h"

int
main (void)
{
  static const struct {
    const char *claim;
    struct standing standing;
    enum state state;
    bool needs_resync;
  } table[] = {
    { "new", { .phase = PHASE_RESTING }, STATE_SYNCING, false },
    { "new, mirror there", { .mirror_connected = true }, STATE_SYNCING, true },
    { "first sync begun", { .mirror_connected = true, .phase = PHASE_BEGUN }, STATE_SYNCING, false },
    { "first sync copies", { .mirror_connected = true, .phase = PHASE_COPYING }, STATE_SYNCING, false },
    { "in sync", { .mirror_connected = true, .synced = true, .phase = PHASE_MIRRORING }, STATE_MIRRORING, false },
    { "mirror lost", { .synced = true }, STATE_DEGRADED, false },
    { "mirror back", { .synced = true, .mirror_connected = true }, STATE_DEGRADED, true },
    { "paused", { .synced = true, .mirror_connected = true, .paused = true }, STATE_DEGRADED, false },
    { "paused before the first sync", { .mirror_connected = true, .paused = true }, STATE_SYNCING, false },
    { "resync begun", { .synced = true, .mirror_connected = true, .phase = PHASE_BEGUN }, STATE_RESYNCING, false },
    { "resync copies", { .synced = true, .mirror_connected = true, .phase = PHASE_COPYING }, STATE_RESYNCING, false },
    { "fenced", { .synced = true, .mirror_connected = true, .fenced = true }, STATE_FENCED, false },
    { "detached", { .synced = true, .mirror_connected = true, .detached = true }, STATE_DETACHED, false },
    { "failed over, although fenced before", { .fenced = true, .failed_over = true }, STATE_FAILED_OVER, false },
    { "failed, whatever else", { .failed = true, .failed_over = true, .synced = true }, STATE_FAILED, false },
  };

  for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
    const struct standing *s = &table[i].standing;
    if (state_of (s) != table[i].state || state_needs_resync (s) != table[i].needs_resync) {
      fprintf (stderr, "%s: %s, needs_resync %d\n", table[i].claim, state_name (state_of (s)), state_needs_resync (s));
      return 1;
    }
  }
  return 0;
}
