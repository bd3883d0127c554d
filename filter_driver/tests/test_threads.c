/* Many guest threads, a mirror that fails now and then, and resyncs all the while: at the end one quiet
 * resync makes both sides equal, and no request ever took longer than the stall time and a margin.
 *
 * Each guest thread writes its own sectors, which lie between those of the others in the same granules: a
 * sane guest has one write to a sector at a time, and granules are shared by all. */
#include <inttypes.h>
#include <string.h>

#include "clock.h"
#include "fake_mirror.h"
#include "filter.h"
#include "resync.h"
#include "scope.h"
#include "scratch.h"
#include "tee.h"

#define GUESTS 6u
#define RESYNCS 25u
#define TIMEOUT_MS 60000
#define STALL_MS 1000

static struct config config;
static struct fake_mirror mirror;
static struct fake_source source;
static struct filter *f;
static struct client clients[FAKE_DISKS];
/* Held shared by every guest request; a drain goes first, or it would never come. */
static pthread_rwlock_t drain = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;
static bool stop;                                           /* atomic */
static int64_t slowest_us;                                  /* atomic */

static void *
guest_main (void *number)
{
  unsigned me = (unsigned) (uintptr_t) number;
  struct dice dice = { me };
  uint8_t sector[SECTOR_BYTES] = { 0 };

  for (unsigned i = 1; !__atomic_load_n (&stop, __ATOMIC_RELAXED); i++) {
    unsigned disk = (unsigned) roll_below (&dice, FAKE_DISKS);
    uint64_t at = roll_below (&dice, FAKE_SECTORS / GUESTS) * GUESTS + me;
    uint64_t value = roll_below (&dice, 8) ? ((uint64_t) me + 1) << 32 | i : 0;

    pthread_rwlock_rdlock (&drain);
    bool tee_first = roll (&dice) % 2;
    if (!tee_first)
      __atomic_store_n (&source.sectors[disk][at], value, __ATOMIC_RELAXED);
    int64_t begin = now_us ();
    memcpy (sector, &value, sizeof value);
    if (value)
      tee_write (&clients[disk], sector, SECTOR_BYTES, at * SECTOR_BYTES, false);
    else
      tee_zero (&clients[disk], SECTOR_BYTES, at * SECTOR_BYTES, false);
    if (roll_below (&dice, 20) == 0)
      tee_flush (&clients[disk]);
    int64_t took = now_us () - begin, worst = __atomic_load_n (&slowest_us, __ATOMIC_RELAXED);
    while (took > worst && !__atomic_compare_exchange_n (&slowest_us, &worst, took, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      continue;
    if (tee_first)
      __atomic_store_n (&source.sectors[disk][at], value, __ATOMIC_RELAXED);
    pthread_rwlock_unlock (&drain);
  }
  return NULL;
}

static bool
resync (void)
{
  struct copy_source sources[FAKE_DISKS] = { 0 };
  struct refusal refusal;
  uint64_t connection, merged;

  if (resync_begin (f, &connection, &refusal) == -1)
    return false;
  pthread_rwlock_wrlock (&drain);
  pthread_rwlock_unlock (&drain);
  for (unsigned d = 0; d < FAKE_DISKS; d++) {
    snprintf (sources[d].export_name, sizeof sources[d].export_name, "%u", d);
    snprintf (sources[d].bitmap, sizeof sources[d].bitmap, "book");
    sources[d].covers = 1;
  }
  if (resync_copy (f, connection, sources, &merged, &refusal) == -1)
    return false;
  CHECK (resync_wait_ended (f, in_ms (60000)) == 0);
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  return f->standing.phase == PHASE_MIRRORING;
}

static void
all_is_equal (void)
{
  for (unsigned d = 0; d < FAKE_DISKS; d++) {
    tee_flush (&clients[d]);
    CHECK (memcmp (source.sectors[d], mirror.cache[d], sizeof mirror.cache[d]) == 0);
    CHECK (memcmp (source.sectors[d], mirror.durable[d], sizeof mirror.durable[d]) == 0);
  }
}

static void *
write_once (void *client)
{
  uint8_t sector[SECTOR_BYTES] = { 0 };

  tee_write (client, sector, SECTOR_BYTES, 0, false);
  return NULL;
}

static void
trouble (unsigned per_mille)
{
  LOCK_FOR_CURRENT_SCOPE (&mirror.mu);
  mirror.trouble_per_mille = per_mille;
}

static void
hang (bool yes)
{
  LOCK_FOR_CURRENT_SCOPE (&mirror.mu);
  mirror.hang = yes;
  pthread_cond_broadcast (&mirror.abandoned);
}

/* The first request that reaches its deadline frees all the others, which came later. */
static void
hung_mirror_frees_all_waiters_at_once (void)
{
  pthread_t threads[8];
  int64_t begin = now_us ();

  hang (true);
  for (unsigned i = 0; i < 8; i++)
    CHECK (pthread_create (&threads[i], NULL, write_once, &clients[i % FAKE_DISKS]) == 0);
  for (unsigned i = 0; i < 8; i++)
    pthread_join (threads[i], NULL);
  CHECK (now_us () - begin < (STALL_MS + 500) * 1000 && now_us () - begin >= (STALL_MS - 10) * 1000);
  begin = now_us ();
  write_once (&clients[0]);
  CHECK (now_us () - begin < 200000); /* DEGRADED: only marked */
  hang (false);
}

int
main (void)
{
  pthread_t threads[GUESTS];
  char folder[64];
  unsigned synced = 0;

  if (!getenv ("VMIRROR_DEBUG"))
    CHECK (freopen ("/dev/null", "w", stderr));
  scratch_make (folder);
  config.protection[0] = 1;
  config.stall_ms = STALL_MS;
  config.disk_count = FAKE_DISKS;
  snprintf (config.vm, sizeof config.vm, "threads");
  snprintf (config.state_dir, sizeof config.state_dir, "%s", folder);
  for (unsigned d = 0; d < FAKE_DISKS; d++) {
    snprintf (config.disks[d].name, sizeof config.disks[d].name, "disk%u", d);
    config.disks[d].size_bytes = FAKE_BYTES;
  }
  fake_mirror_init (&mirror, config.protection, 1);
  fake_source_init (&source);
  f = filter_new (&config, &mirror.dev, &source.dev);
  CHECK (f && filter_start_threads (f) == 0);
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    CHECK (client_open (&clients[d], &f->disks[d]) == 0);

  trouble (1);
  for (uintptr_t i = 0; i < GUESTS; i++)
    CHECK (pthread_create (&threads[i], NULL, guest_main, (void *) i) == 0);
  for (int64_t until = in_ms (TIMEOUT_MS); synced < RESYNCS;) {
    CHECK (now_us () < until);
    synced += resync ();
  }
  __atomic_store_n (&stop, true, __ATOMIC_SEQ_CST);
  for (unsigned i = 0; i < GUESTS; i++)
    pthread_join (threads[i], NULL);
  CHECK (slowest_us < (STALL_MS + 1000) * 1000);

  trouble (0);
  CHECK (resync ());
  all_is_equal ();
  hung_mirror_frees_all_waiters_at_once ();
  source.sectors[0][0] = source.sectors[1][0] = 0; /* what write_once wrote */
  CHECK (resync ());
  all_is_equal ();

  for (unsigned d = 0; d < FAKE_DISKS; d++)
    client_close (&clients[d]);
  CHECK (filter_stop (f));
  filter_free (f);
  CHECK (mirror.sessions == 0);
  scratch_remove (folder);
  return 0;
}
