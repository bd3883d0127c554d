/* A mirror and a source made of memory, for tests: a sector is one number (0: zeroes).
 *
 * The mirror has a volatile cache and what is durable.  It can lose its connection before, in the middle of
 * or after a request, answer errors, and crash, after which each unflushed sector is there or not as the dice
 * fall.
 */
#pragma once

#include <pthread.h>

#include "check.h"
#include "granule.h"
#include "mirror_dev.h"
#include "source_dev.h"
#include "superblock.h"

#define FAKE_DISKS 2u
#define FAKE_GRANULES 8u
#define FAKE_SECTORS (FAKE_GRANULES * SECTORS_PER_GRANULE)
#define FAKE_BYTES ((uint64_t) FAKE_SECTORS * SECTOR_BYTES)

struct fake_mirror {
  struct mirror_dev dev; /* first */
  pthread_mutex_t mu;    /* protects everything */
  struct dice dice;
  uint64_t cache[FAKE_DISKS][FAKE_SECTORS];
  uint64_t durable[FAKE_DISKS][FAKE_SECTORS];
  uint8_t super_cache[SUPERBLOCK_FILE_BYTES];
  uint8_t super_durable[SUPERBLOCK_FILE_BYTES];
  bool up;
  uint64_t incarnation; /* sessions of an older one are dead */
  unsigned trouble_per_mille;
  unsigned sessions;
  void (*during) (void *opaque, bool flush); /* after a write or flush was done, before it is answered; NULL: none */
  void *opaque;
  bool hang; /* requests wait until they are abandoned or their deadline */
  pthread_cond_t abandoned;
};

struct fake_source {
  struct source_dev dev; /* first */
  uint64_t sectors[FAKE_DISKS][FAKE_SECTORS];
  bool book[FAKE_DISKS][FAKE_GRANULES];  /* what the filter missed, as QEMU's bitmap knows it */
  bool taken[FAKE_DISKS][FAKE_GRANULES]; /* the copy that the filter is shown */
  void (*between) (void *opaque, unsigned disk); /* after the data was taken, before it is given */
  void *opaque;
};

void fake_mirror_init (struct fake_mirror *m, const uint8_t uuid[16], uint64_t seed);
void fake_source_init (struct fake_source *s);
/* The session was not cut since it was opened, whether the filter knows or not. */
bool fake_session_alive (const struct mirror_session *s);
/* The link is cut; with `crash` the mirror's host lost its cache, too. */
void fake_mirror_cut (struct fake_mirror *m, bool crash);
