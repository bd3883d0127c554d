#include "fake_mirror.h"

#include <errno.h>
#include <string.h>

#include "clock.h"
#include "scope.h"
#include "text.h"

struct mirror_session {
  struct fake_mirror *m;
  uint64_t incarnation;
  bool abandoned;
};

static void
cut_locked (struct fake_mirror *m, bool crash)
{
  m->incarnation++;
  if (!crash)
    return;
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    for (unsigned s = 0; s < FAKE_SECTORS; s++) {
      if (m->cache[d][s] != m->durable[d][s] && roll (&m->dice) % 2)
        m->durable[d][s] = m->cache[d][s];
      m->cache[d][s] = m->durable[d][s];
    }
  memcpy (m->super_cache, m->super_durable, sizeof m->super_cache);
}

bool
fake_session_alive (const struct mirror_session *s)
{
  LOCK_FOR_CURRENT_SCOPE (&s->m->mu);
  return s->m->up && s->incarnation == s->m->incarnation;
}

void
fake_mirror_cut (struct fake_mirror *m, bool crash)
{
  LOCK_FOR_CURRENT_SCOPE (&m->mu);
  cut_locked (m, crash);
}

/* What a request meets: 0 to go on, -1 with errno, 1: do it, but the answer is lost. */
static int
meet_locked (struct mirror_session *s, int64_t deadline_us)
{
  struct fake_mirror *m = s->m;

  while (m->hang && !s->abandoned) {
    struct timespec until = deadline_timespec (deadline_us);
    if (pthread_cond_clockwait (&m->abandoned, &m->mu, CLOCK_MONOTONIC, &until) == ETIMEDOUT) {
      errno = ETIMEDOUT;
      return -1;
    }
  }
  if (s->abandoned) {
    errno = ESHUTDOWN;
    return -1;
  }
  if (!m->up || s->incarnation != m->incarnation) {
    errno = ENOTCONN;
    return -1;
  }
  if (roll_below (&m->dice, 1000) >= m->trouble_per_mille)
    return 0;
  switch (roll_below (&m->dice, 4)) {
  case 0:
    errno = EIO;
    return -1;
  case 1:
    cut_locked (m, roll (&m->dice) % 2);
    errno = ENOTCONN;
    return -1;
  default:
    errno = ENOTCONN;
    return 1;
  }
}

static int
lose_answer_locked (struct fake_mirror *m)
{
  cut_locked (m, roll (&m->dice) % 2);
  errno = ENOTCONN;
  return -1;
}

/* Something else happens before the answer arrives. */
static int
answer (struct fake_mirror *m, int r, bool flush)
{
  if (r == 0 && m->during)
    m->during (m->opaque, flush);
  return r;
}

static struct mirror_session *
fake_open (struct mirror_dev *dev, bool probe, int64_t deadline_us, char *fault)
{
  struct fake_mirror *m = (struct fake_mirror *) dev;

  (void) probe;
  (void) deadline_us;
  LOCK_FOR_CURRENT_SCOPE (&m->mu);
  if (!m->up) {
    text_copy (fault, MIRROR_FAULT_SIZE, "the fake mirror is down");
    return NULL;
  }
  struct mirror_session *s = calloc (1, sizeof *s);
  CHECK (s);
  *s = (struct mirror_session) { m, m->incarnation, false };
  m->sessions++;
  return s;
}

static int
change_cache (struct mirror_session *s, unsigned disk, const uint8_t *buf, uint64_t count, uint64_t offset, int64_t deadline_us)
{
  struct fake_mirror *m = s->m;

  CHECK (disk < FAKE_DISKS && offset % SECTOR_BYTES == 0 && count % SECTOR_BYTES == 0 && offset + count <= FAKE_BYTES);
  LOCK_FOR_CURRENT_SCOPE (&m->mu);
  int r = meet_locked (s, deadline_us);
  if (r == -1)
    return -1;
  uint64_t sectors = count / SECTOR_BYTES, first = offset / SECTOR_BYTES;
  if (r == 1)
    sectors = roll_below (&m->dice, sectors + 1); /* torn */
  for (uint64_t i = 0; i < sectors; i++) {
    uint64_t value = 0;
    if (buf)
      memcpy (&value, buf + i * SECTOR_BYTES, sizeof value);
    m->cache[disk][first + i] = value;
  }
  return r == 0 ? 0 : lose_answer_locked (m);
}

static int
change (struct mirror_session *s, unsigned disk, const uint8_t *buf, uint64_t count, uint64_t offset, int64_t deadline_us)
{
  return answer (s->m, change_cache (s, disk, buf, count, offset, deadline_us), false);
}

static int
flush_cache (struct mirror_session *s, unsigned disk, int64_t deadline_us)
{
  struct fake_mirror *m = s->m;

  LOCK_FOR_CURRENT_SCOPE (&m->mu);
  int r = meet_locked (s, deadline_us);
  if (r == -1)
    return -1;
  memcpy (m->durable[disk], m->cache[disk], sizeof m->cache[disk]);
  return r == 0 ? 0 : lose_answer_locked (m);
}

static int
fake_flush (struct mirror_session *s, unsigned disk, int64_t deadline_us)
{
  return answer (s->m, flush_cache (s, disk, deadline_us), true);
}

static int
fake_pwrite (struct mirror_session *s, unsigned disk, const void *buf, uint32_t count, uint64_t offset, bool fua,
             int64_t deadline_us)
{
  if (change (s, disk, buf, count, offset, deadline_us) == -1)
    return -1;
  return fua ? fake_flush (s, disk, deadline_us) : 0;
}

static int
fake_zero (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, bool fua, int64_t deadline_us)
{
  if (change (s, disk, NULL, count, offset, deadline_us) == -1)
    return -1;
  return fua ? fake_flush (s, disk, deadline_us) : 0;
}

static void
zero_run (const uint64_t *sectors, uint64_t offset, uint64_t count, bool *zero, uint64_t *length)
{
  uint64_t first = offset / SECTOR_BYTES, n = 0;

  *zero = sectors[first] == 0;
  while (n < count / SECTOR_BYTES && (sectors[first + n] == 0) == *zero)
    n++;
  *length = n * SECTOR_BYTES;
}

static int
fake_zero_extent (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                  uint64_t *length)
{
  struct fake_mirror *m = s->m;

  LOCK_FOR_CURRENT_SCOPE (&m->mu);
  if (meet_locked (s, deadline_us) != 0)
    return -1;
  zero_run (m->cache[disk], offset, count, zero, length);
  if (roll_below (&m->dice, 4) == 0)
    *zero = false; /* a server need not know */
  return 0;
}

static int
fake_super_read (struct mirror_session *s, uint8_t *file, int64_t deadline_us)
{
  LOCK_FOR_CURRENT_SCOPE (&s->m->mu);
  if (meet_locked (s, deadline_us) != 0)
    return -1;
  memcpy (file, s->m->super_cache, sizeof s->m->super_cache);
  return 0;
}

static int
fake_super_write (struct mirror_session *s, const uint8_t *slot, uint32_t count, uint64_t offset, int64_t deadline_us)
{
  struct fake_mirror *m = s->m;

  LOCK_FOR_CURRENT_SCOPE (&m->mu);
  int r = meet_locked (s, deadline_us);
  if (r == -1)
    return -1;
  if (r == 1)
    count = (uint32_t) roll_below (&m->dice, count + 1);
  memcpy (m->super_cache + offset, slot, count);
  memcpy (m->super_durable, m->super_cache, sizeof m->super_cache);
  return r == 0 ? 0 : lose_answer_locked (m);
}

static void
fake_abandon (struct mirror_session *s)
{
  LOCK_FOR_CURRENT_SCOPE (&s->m->mu);
  s->abandoned = true;
  pthread_cond_broadcast (&s->m->abandoned);
}

static void
fake_close (struct mirror_session *s)
{
  {
    LOCK_FOR_CURRENT_SCOPE (&s->m->mu);
    s->m->sessions--;
  }
  free (s);
}

static const struct mirror_dev_ops fake_mirror_ops = {
  .open = fake_open,
  .pwrite = fake_pwrite,
  .zero = fake_zero,
  .flush = fake_flush,
  .zero_extent = fake_zero_extent,
  .super_read = fake_super_read,
  .super_write = fake_super_write,
  .abandon = fake_abandon,
  .close = fake_close,
};

void
fake_mirror_init (struct fake_mirror *m, const uint8_t uuid[16], uint64_t seed)
{
  struct superblock first = { .sequence = 1, .disk_count = FAKE_DISKS };
  uint8_t slot[SUPERBLOCK_SLOT_BYTES];

  memset (m, 0, sizeof *m);
  m->dev.ops = &fake_mirror_ops;
  m->dice.state = seed;
  m->up = true;
  pthread_mutex_init (&m->mu, NULL);
  pthread_cond_init (&m->abandoned, NULL);
  memcpy (first.uuid, uuid, sizeof first.uuid);
  for (unsigned d = 0; d < FAKE_DISKS; d++)
    first.disk_size_bytes[d] = FAKE_BYTES;
  uint64_t offset = superblock_encode (&first, slot);
  memcpy (m->super_cache + offset, slot, sizeof slot);
  memcpy (m->super_durable, m->super_cache, sizeof m->super_cache);
}

/* -- the source -- */

struct source_reader {
  struct fake_source *s;
  unsigned disk;
};

static struct source_reader *
source_open (struct source_dev *dev, const char *socket, const char *export_name, const char *bitmap, uint64_t size_bytes,
             int64_t deadline_us, char *fault)
{
  struct source_reader *r = calloc (1, sizeof *r);

  (void) socket;
  (void) bitmap;
  (void) deadline_us;
  (void) fault;
  CHECK (r && size_bytes == FAKE_BYTES);
  *r = (struct source_reader) { (struct fake_source *) dev, (unsigned) atoi (export_name) };
  return r;
}

static int
source_pread (struct source_reader *r, void *buf, uint32_t count, uint64_t offset, int64_t deadline_us)
{
  struct fake_source *s = r->s;

  (void) deadline_us;
  memset (buf, 0, count);
  for (uint32_t i = 0; i < count / SECTOR_BYTES; i++) {
    uint64_t value = __atomic_load_n (&s->sectors[r->disk][offset / SECTOR_BYTES + i], __ATOMIC_RELAXED);
    memcpy ((uint8_t *) buf + (size_t) i * SECTOR_BYTES, &value, sizeof value);
  }
  if (s->between)
    s->between (s->opaque, r->disk);
  return 0;
}

static int
source_zero_extent (struct source_reader *r, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                    uint64_t *length)
{
  struct fake_source *s = r->s;
  uint64_t copy[FAKE_SECTORS];

  (void) deadline_us;
  for (unsigned i = 0; i < FAKE_SECTORS; i++)
    copy[i] = __atomic_load_n (&s->sectors[r->disk][i], __ATOMIC_RELAXED);
  zero_run (copy, offset, count, zero, length);
  if (s->between)
    s->between (s->opaque, r->disk);
  return 0;
}

static int
source_dirty (struct source_reader *r, int64_t deadline_us, source_dirty_fn *dirty, void *opaque)
{
  (void) deadline_us;
  for (unsigned g = 0; g < FAKE_GRANULES; g++)
    if (r->s->taken[r->disk][g])
      dirty (opaque, (uint64_t) g * GRANULE_BYTES, GRANULE_BYTES);
  return 0;
}

static void
source_abandon (struct source_reader *r)
{
  (void) r;
}

static void
source_close (struct source_reader *r)
{
  free (r);
}

static const struct source_dev_ops fake_source_ops = {
  .open = source_open,
  .pread = source_pread,
  .zero_extent = source_zero_extent,
  .dirty_extents = source_dirty,
  .abandon = source_abandon,
  .close = source_close,
};

void
fake_source_init (struct fake_source *s)
{
  memset (s, 0, sizeof *s);
  s->dev.ops = &fake_source_ops;
}
