/* The whole core against a mirror, a source and a guest made of memory, driven by seeds.
 *
 *   test_simulation [FIRST_SEED [COUNT]]
 *
 * One thread at a time moves (the copier's steps are interleaved with the guest's inside the source's reads),
 * so a seed is the same run each time.  After every step:
 *   I-6  a granule that differs between source and mirror, or would differ if the mirror's host lost what was
 *        not flushed, is dirty in the file (or in the source's book, while the filter knows that it needs it)
 *   I-2  after a flush in MIRRORING everything is durable on the mirror
 *        MIRRORING means equal, `consistent` is durably off before anything is written out of order, and
 *        generations only grow
 */
#include <inttypes.h>
#include <string.h>

#include "clock.h"
#include "fake_mirror.h"
#include "filter.h"
#include "resync.h"
#include "scratch.h"
#include "tee.h"

#define STEPS 120

/* A guest write of which one half (source or tee) has happened. */
struct half {
  bool there, tee_first;
  unsigned disk;
  uint64_t first, count; /* sectors */
  uint64_t value;        /* of the first sector; 0: zeroes */
};

struct world {
  struct dice dice;
  struct config config;
  struct fake_mirror mirror;
  struct fake_source source;
  struct filter *f;
  struct client *clients[FAKE_DISKS]; /* NULL: the hypervisor has no connection */
  struct half half;
  struct client *old_client; /* of a connection that was replaced, and what is still on its way there */
  struct half late;
  uint64_t next_value;
  uint64_t generation_seen;
  uint8_t buf[16 * SECTOR_BYTES];
};

static void
to_source (struct world *w, const struct half *h)
{
  for (uint64_t i = 0; i < h->count; i++)
    __atomic_store_n (&w->source.sectors[h->disk][h->first + i], h->value ? h->value + i : 0, __ATOMIC_RELAXED);
  if (!w->clients[h->disk])
    for (uint64_t s = h->first; s < h->first + h->count; s++)
      w->source.book[h->disk][s / SECTORS_PER_GRANULE] = true;
}

static void
to_client (struct world *w, struct client *client, const struct half *h)
{
  bool fua = roll_below (&w->dice, 8) == 0;

  if (!client)
    return;
  if (!h->value) {
    tee_zero (client, (uint32_t) (h->count * SECTOR_BYTES), h->first * SECTOR_BYTES, fua);
    return;
  }
  memset (w->buf, 0, sizeof w->buf);
  for (uint64_t i = 0; i < h->count; i++) {
    uint64_t value = h->value + i;
    memcpy (w->buf + i * SECTOR_BYTES, &value, sizeof value);
  }
  tee_write (client, w->buf, (uint32_t) (h->count * SECTOR_BYTES), h->first * SECTOR_BYTES, fua);
}

static void
to_tee (struct world *w, const struct half *h)
{
  to_client (w, w->clients[h->disk], h);
}

static void
end_half (struct world *w)
{
  if (!w->half.there)
    return;
  w->half.there = false;
  w->half.tee_first ? to_source (w, &w->half) : to_tee (w, &w->half);
}

static void
guest_write (struct world *w, bool may_be_half)
{
  struct half h = { .there = true, .tee_first = roll (&w->dice) % 2, .disk = (unsigned) roll_below (&w->dice, FAKE_DISKS) };

  end_half (w); /* a sane guest has one write to a sector at a time */
  h.first = roll_below (&w->dice, FAKE_SECTORS);
  h.count = 1 + roll_below (&w->dice, 16);
  if (h.count > FAKE_SECTORS - h.first)
    h.count = FAKE_SECTORS - h.first;
  if (roll_below (&w->dice, 5)) {
    h.value = w->next_value;
    w->next_value += h.count;
  }
  /* Without a connection there is no tee: only the source half, so nothing can stay open. */
  h.tee_first ? to_tee (w, &h) : to_source (w, &h);
  w->half = h;
  if (!may_be_half || !w->clients[h.disk] || roll (&w->dice) % 2)
    end_half (w);
}

/* Runs in the copier, between its look at the source and its write to the mirror. */
static void
between (void *opaque, unsigned disk)
{
  struct world *w = opaque;
  struct superblock block;
  char why[200];

  pthread_mutex_lock (&w->mirror.mu);
  int r = superblock_decode (w->mirror.super_durable, &block, why, sizeof why);
  pthread_mutex_unlock (&w->mirror.mu);
  CHECK (r == 0 && !block.consistent);
  for (uint64_t n = roll_below (&w->dice, 3); n > 0; n--)
    guest_write (w, true);
  if (w->clients[disk] && roll_below (&w->dice, 4) == 0)
    tee_flush (w->clients[disk]);
  if (roll_below (&w->dice, 60) == 0)
    fake_mirror_cut (&w->mirror, roll (&w->dice) % 2);
}

/* A request of the old connection arrives after its newer self, and after what the guest wrote since. */
static void
deliver_late (struct world *w)
{
  if (!w->old_client)
    return;
  if (w->late.there)
    to_client (w, w->old_client, &w->late);
  client_close (w->old_client);
  free (w->old_client);
  w->old_client = NULL;
}

/* Between what the mirror did and its answer: the guest writes while a flush is under way and flushes while a
   write is; or the connection breaks and the mirror's host crashes, and the answer is worth nothing. */
static void
during (void *opaque, bool flush)
{
  struct world *w = opaque;
  unsigned disk = (unsigned) roll_below (&w->dice, FAKE_DISKS);

  w->mirror.during = NULL; /* not once more inside */
  if (flush && roll_below (&w->dice, 3) == 0)
    guest_write (w, false);
  else if (!flush && w->clients[disk] && roll_below (&w->dice, 10) == 0)
    tee_flush (w->clients[disk]);
  w->mirror.during = during;
  if (roll_below (&w->dice, 100) > 0)
    return;
  filter_lose_link (w->f, NULL, "broken in the test");
  fake_mirror_cut (&w->mirror, true);
}

static void
connect_guest (struct world *w, unsigned disk)
{
  struct half resent = w->half;

  deliver_late (w);
  if (w->clients[disk] && resent.there && resent.disk == disk && !resent.tee_first) {
    w->half.there = false;
    w->late = resent;
    w->old_client = w->clients[disk];
    w->clients[disk] = calloc (1, sizeof *w->clients[disk]);
    CHECK (w->clients[disk] && client_open (w->clients[disk], &w->f->disks[disk]) == 0);
    to_tee (w, &resent);
    resent.value = w->next_value; /* and the guest goes on with newer data at the same place */
    w->next_value += resent.count;
    to_source (w, &resent);
    to_tee (w, &resent);
    return;
  }
  end_half (w);
  if (w->clients[disk]) {
    client_close (w->clients[disk]);
    free (w->clients[disk]);
  }
  w->clients[disk] = calloc (1, sizeof *w->clients[disk]);
  CHECK (w->clients[disk] && client_open (w->clients[disk], &w->f->disks[disk]) == 0);
}

static void
disconnect_guest (struct world *w, unsigned disk)
{
  end_half (w);
  if (!w->clients[disk])
    return;
  client_close (w->clients[disk]);
  free (w->clients[disk]);
  w->clients[disk] = NULL;
}

/* QEMU's transaction: a copy for the filter, and an empty bitmap for what comes. */
static void
take_book (struct world *w)
{
  memcpy (w->source.taken, w->source.book, sizeof w->source.taken);
  memset (w->source.book, 0, sizeof w->source.book);
}

static void
give_book_back (struct world *w)
{
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    for (unsigned g = 0; g < FAKE_GRANULES; g++)
      w->source.book[d][g] = w->source.book[d][g] || w->source.taken[d][g];
}

static bool
resync (struct world *w)
{
  struct copy_source sources[FAKE_DISKS] = { 0 };
  struct refusal refusal;
  uint64_t connection, merged;

  if (resync_begin (w->f, &connection, &refusal) == -1)
    return false;
  for (uint64_t n = roll_below (&w->dice, 4); n > 0; n--)
    guest_write (w, true);
  end_half (w); /* the drain */
  for (unsigned d = 0; d < FAKE_DISKS; d++) {
    snprintf (sources[d].export_name, sizeof sources[d].export_name, "%u", d);
    snprintf (sources[d].socket, sizeof sources[d].socket, "fake");
    sources[d].covers = w->f->disks[d].client_connection;
    if (roll_below (&w->dice, 10)) /* else the book was lost: everything is copied */
      snprintf (sources[d].bitmap, sizeof sources[d].bitmap, "book");
  }
  take_book (w);
  if (resync_copy (w->f, connection, sources, &merged, &refusal) == -1) {
    give_book_back (w);
    return false;
  }
  /* The copier has the guest now.  What was taken of the book is durably in the maps. */
  CHECK (resync_wait_ended (w->f, in_ms (60000)) == 0);
  end_half (w);
  return w->f->standing.phase == PHASE_MIRRORING;
}

static struct filter *
start (struct world *w)
{
  struct filter *f = filter_new (&w->config, &w->mirror.dev, &w->source.dev);

  CHECK (f && !f->standing.failed);
  f->copiers = 1;
  return f;
}

static void
restart (struct world *w, bool crash)
{
  w->late.there = w->late.there && !crash;
  deliver_late (w);
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    disconnect_guest (w, d);
  if (crash)
    filter_lose_link (w->f, NULL, "a crash"); /* memory only: the files stay as they are */
  else
    CHECK (filter_stop (w->f));
  filter_free (w->f);
  CHECK (w->mirror.sessions == 0);
  for (uint64_t n = roll_below (&w->dice, 3); n > 0; n--)
    guest_write (w, false); /* missed: in the book */
  w->f = start (w);
}

static void
check_granule (struct world *w, unsigned d, uint64_t g)
{
  const uint64_t *source = w->source.sectors[d] + g * SECTORS_PER_GRANULE;
  bool differs = memcmp (source, w->mirror.cache[d] + g * SECTORS_PER_GRANULE, SECTORS_PER_GRANULE * 8) != 0;
  bool might = memcmp (source, w->mirror.durable[d] + g * SECTORS_PER_GRANULE, SECTORS_PER_GRANULE * 8) != 0;
  bool dirty = dirty_map_has (&w->f->disks[d].map, g);
  bool booked = w->source.book[d][g];

  if ((differs || might) && !dirty && !booked) {
    printf ("disk%u granule %" PRIu64 ": differs %d, might %d, but is clean; phase %d cause %s\n", d, g, differs,
             might, w->f->standing.phase, w->f->cause);
    fflush (stdout);
    abort ();
  }
  /* A mirror that crashed without the filter knowing yet lost what is unflushed, and that is dirty. */
  if (w->f->standing.phase == PHASE_MIRRORING && !booked && fake_session_alive (w->f->link->session))
    CHECK (!differs);
}

static void
check (struct world *w)
{
  if (w->half.there)
    return; /* a write under way: either side may have it */
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    for (uint64_t g = 0; g < FAKE_GRANULES; g++)
      check_granule (w, d, g);
  CHECK (w->f->saved.generation >= w->generation_seen);
  w->generation_seen = w->f->saved.generation;
}

static void
check_mirroring (struct world *w)
{
  struct superblock block;
  char why[200];

  w->mirror.during = NULL; /* a write during the flush need not be durable after it */
  CHECK (superblock_decode (w->mirror.super_durable, &block, why, sizeof why) == 0);
  CHECK (block.consistent && block.generation == w->f->saved.generation);
  for (unsigned d = 0; d < FAKE_DISKS; d++) {
    if (w->f->standing.phase != PHASE_MIRRORING)
      return; /* this time the flush has found trouble */
    CHECK (book_copy_granules (&w->f->disks[d].book) == 0);
    if (!w->clients[d])
      continue;
    tee_flush (w->clients[d]);
    if (w->f->standing.phase == PHASE_MIRRORING)
      CHECK (memcmp (w->source.sectors[d], w->mirror.durable[d], sizeof w->mirror.durable[d]) == 0);
  }
}

static void
step (struct world *w)
{
  unsigned disk = (unsigned) roll_below (&w->dice, FAKE_DISKS);

  switch (roll_below (&w->dice, 24)) {
  case 0:
    fake_mirror_cut (&w->mirror, false);
    break;
  case 1:
    fake_mirror_cut (&w->mirror, true);
    break;
  case 2:
    w->mirror.up = !w->mirror.up;
    fake_mirror_cut (&w->mirror, false);
    break;
  case 3:
    connect_guest (w, disk);
    break;
  case 4:
    disconnect_guest (w, disk);
    break;
  case 12:
    deliver_late (w);
    break;
  case 5:
    restart (w, roll (&w->dice) % 2);
    break;
  case 6:
  case 7:
  case 8:
    w->mirror.up = true;
    if (resync (w)) {
      check (w);
      check_mirroring (w);
      w->mirror.during = during;
    }
    break;
  case 9:
  case 10:
  case 11:
    if (w->clients[disk])
      tee_flush (w->clients[disk]);
    break;
  default:
    guest_write (w, true);
  }
}

static void
run (uint64_t seed, const char *folder)
{
  struct world *w = calloc (1, sizeof *w);

  CHECK (w);
  w->dice.state = seed;
  w->next_value = 1;
  w->config.protection[0] = 1;
  w->config.stall_ms = 5000;
  w->config.disk_count = FAKE_DISKS;
  snprintf (w->config.vm, sizeof w->config.vm, "seed%" PRIu64, seed);
  snprintf (w->config.state_dir, sizeof w->config.state_dir, "%s/%" PRIu64, folder, seed);
  CHECK (mkdir (w->config.state_dir, 0700) == 0);
  for (unsigned d = 0; d < FAKE_DISKS; d++) {
    snprintf (w->config.disks[d].name, sizeof w->config.disks[d].name, "disk%u", d);
    w->config.disks[d].size_bytes = FAKE_BYTES;
  }
  fake_mirror_init (&w->mirror, w->config.protection, seed);
  fake_source_init (&w->source);
  w->source.between = between;
  w->source.opaque = w;
  w->mirror.trouble_per_mille = seed % 3 == 0 ? 0 : 15;
  w->mirror.during = during;
  w->mirror.opaque = w;
  w->f = start (w);
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    connect_guest (w, d);
  for (unsigned i = 0; i < STEPS; i++) {
    step (w);
    check (w);
  }
  /* However it went: without more trouble one resync heals everything. */
  w->mirror.trouble_per_mille = 0;
  w->mirror.up = true;
  end_half (w);
  deliver_late (w);
  w->source.between = NULL;
  w->mirror.during = NULL;
  CHECK (resync (w));
  check (w);
  check_mirroring (w);
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    disconnect_guest (w, d);
  CHECK (filter_stop (w->f));
  filter_free (w->f);
  CHECK (w->mirror.sessions == 0);
  free (w);
}

int
main (int argc, char **argv)
{
  uint64_t first = argc > 1 ? strtoull (argv[1], NULL, 10) : 1, count = argc > 2 ? strtoull (argv[2], NULL, 10) : 200;
  char folder[64];

  if (!getenv ("VMIRROR_DEBUG"))
    CHECK (freopen ("/dev/null", "w", stderr) || true);
  scratch_make (folder);
  for (uint64_t seed = first; seed < first + count; seed++) {
    printf ("seed %" PRIu64 "\n", seed); /* the last one printed is the failing one */
    fflush (stdout);
    run (seed, folder);
  }
  scratch_remove (folder);
  return 0;
}
