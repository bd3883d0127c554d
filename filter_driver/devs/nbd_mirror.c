#include "nbd_mirror.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "nbd_connection.h"
#include "scope.h"
#include "text.h"

struct nbd_mirror {
  struct mirror_dev dev; /* first */
  const struct config *config;
};

/* The plain connections of one disk.  A stack: at queue depth 1 it is always the same connection that is
   used, whose socket and buffers are warm. */
struct pool {
  pthread_mutex_t mu;
  pthread_cond_t returned;
  struct nbd_connection connections[NBD_CONNECTIONS_PER_DISK];
  unsigned count;                             /* opened */
  unsigned free[NBD_CONNECTIONS_PER_DISK];    /* [mu] */
  unsigned free_count;                        /* [mu] */
  unsigned waiters;                           /* [mu] */
  bool abandoned;                             /* [mu] */
  pthread_mutex_t extents_mu;                 /* one question about zeroes at a time */
  struct nbd_connection extents;
};

struct mirror_session {
  struct nbd_mirror *mirror;
  struct nbd_connection superblock;
  pthread_mutex_t superblock_mu;
  struct pool pools[DISKS_MAX];
};

static void
session_free (struct mirror_session *s)
{
  for (unsigned i = 0; i < s->mirror->config->disk_count; i++) {
    struct pool *p = &s->pools[i];
    for (unsigned c = 0; c < p->count; c++)
      nbd_connection_close (&p->connections[c]);
    nbd_connection_close (&p->extents);
    pthread_mutex_destroy (&p->mu);
    pthread_mutex_destroy (&p->extents_mu);
    pthread_cond_destroy (&p->returned);
  }
  nbd_connection_close (&s->superblock);
  pthread_mutex_destroy (&s->superblock_mu);
  free (s);
}

static int
open_pool (struct mirror_session *s, unsigned disk, bool probe, int64_t deadline_us, char *fault)
{
  const struct config *config = s->mirror->config;
  struct pool *p = &s->pools[disk];
  struct nbd_wanted wanted = { .socket = config->mirror_socket,
                               .export_name = config->disks[disk].mirror_export,
                               .extents = true,
                               .writable = true,
                               .size_bytes = config->disks[disk].size_bytes };
  unsigned wish = NBD_CONNECTIONS_TOTAL / config->disk_count;

  if (nbd_connection_open (&p->extents, &wanted, deadline_us, fault) == -1)
    return -1;
  if (probe)
    return 0;
  if (wish > NBD_CONNECTIONS_PER_DISK)
    wish = NBD_CONNECTIONS_PER_DISK;
  if (nbd_can_multi_conn (p->extents.nbd) != 1)
    wish = 1;
  wanted.extents = false;
  while (p->count < wish) {
    int r = nbd_connection_open (&p->connections[p->count], &wanted, deadline_us, fault);
    p->free[p->free_count++] = p->count++;
    if (r == -1)
      return -1;
  }
  return 0;
}

static struct mirror_session *
mirror_open (struct mirror_dev *dev, bool probe, int64_t deadline_us, char *fault)
{
  struct nbd_mirror *m = (struct nbd_mirror *) dev;
  const struct config *config = m->config;
  struct mirror_session *s = calloc (1, sizeof *s);
  char why[MIRROR_FAULT_SIZE] = "";

  if (!s) {
    text_copy (fault, MIRROR_FAULT_SIZE, "no memory");
    return NULL;
  }
  s->mirror = m;
  pthread_mutex_init (&s->superblock_mu, NULL);
  for (unsigned i = 0; i < config->disk_count; i++) {
    pthread_mutex_init (&s->pools[i].mu, NULL);
    pthread_mutex_init (&s->pools[i].extents_mu, NULL);
    pthread_cond_init (&s->pools[i].returned, NULL);
  }
  struct nbd_wanted wanted
    = { .socket = config->mirror_socket, .export_name = config->superblock_export, .writable = !probe };
  int r = nbd_connection_open (&s->superblock, &wanted, deadline_us, why);
  if (r == 0 && nbd_get_size (s->superblock.nbd) < SUPERBLOCK_FILE_BYTES) {
    text_format (why, sizeof why, "export %.64s is smaller than a superblock", config->superblock_export);
    r = -1;
  }
  for (unsigned i = 0; r == 0 && i < config->disk_count; i++)
    r = open_pool (s, i, probe, deadline_us, why);
  if (r == 0)
    return s;
  text_format (fault, MIRROR_FAULT_SIZE, "the mirror cannot be reached: %s", why);
  session_free (s);
  return NULL;
}

static struct nbd_connection *
pool_take (struct pool *p, int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);
  int r = 0;

  LOCK_FOR_CURRENT_SCOPE (&p->mu);
  while (p->free_count == 0 && !p->abandoned && r == 0) {
    p->waiters++;
    r = pthread_cond_clockwait (&p->returned, &p->mu, CLOCK_MONOTONIC, &until);
    p->waiters--;
  }
  if (p->abandoned || p->free_count == 0) {
    errno = p->abandoned ? ESHUTDOWN : ETIMEDOUT;
    return NULL;
  }
  return &p->connections[p->free[--p->free_count]];
}

static void
pool_give (struct pool *p, struct nbd_connection *c)
{
  LOCK_FOR_CURRENT_SCOPE (&p->mu);
  assert (p->free_count < p->count);
  p->free[p->free_count++] = (unsigned) (c - p->connections);
  if (p->waiters)
    pthread_cond_signal (&p->returned);
}

static int
write_piece (struct nbd_connection *c, const uint8_t *buf, uint32_t count, uint64_t offset, bool fua, int64_t deadline_us)
{
  return nbd_connection_request (c, &(struct nbd_request) { NBD_WRITE, fua && c->fua, buf, count, offset }, deadline_us);
}

static int
flush_on (struct nbd_connection *c, int64_t deadline_us)
{
  return nbd_connection_request (c, &(struct nbd_request) { .command = NBD_FLUSH }, deadline_us);
}

static int
mirror_write (struct mirror_session *s, unsigned disk, const void *buf, uint32_t count, uint64_t offset, bool fua,
           int64_t deadline_us)
{
  struct pool *p = &s->pools[disk];
  struct nbd_connection *c = pool_take (p, deadline_us);
  int r = 0;

  if (!c)
    return -1;
  for (uint32_t done = 0, piece; r == 0 && done < count; done += piece) {
    piece = count - done < NBD_REQUEST_MAX ? count - done : NBD_REQUEST_MAX;
    r = write_piece (c, (const uint8_t *) buf + done, piece, offset + done, fua, deadline_us);
  }
  if (r == 0 && fua && !c->fua)
    r = flush_on (c, deadline_us);
  int err = errno;
  pool_give (p, c);
  errno = err;
  return r;
}

static int
zero_with_writes (struct nbd_connection *c, uint64_t count, uint64_t offset, bool fua, int64_t deadline_us)
{
  static const uint8_t zeroes[1u << 20];
  int r = 0;

  for (uint64_t piece; r == 0 && count > 0; count -= piece, offset += piece) {
    piece = count < sizeof zeroes ? count : sizeof zeroes;
    r = write_piece (c, zeroes, (uint32_t) piece, offset, fua, deadline_us);
  }
  return r;
}

static int
mirror_zero (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, bool fua, int64_t deadline_us)
{
  struct pool *p = &s->pools[disk];
  struct nbd_connection *c = pool_take (p, deadline_us);
  int r = 0;

  if (!c)
    return -1;
  if (nbd_can_zero (c->nbd) != 1)
    r = zero_with_writes (c, count, offset, fua, deadline_us);
  else
    for (uint64_t piece; r == 0 && count > 0; count -= piece, offset += piece) {
      /* Without NO_HOLE: the server may give the space back. */
      piece = count < (UINT64_C (1) << 30) ? count : UINT64_C (1) << 30;
      struct nbd_request zeroes = { NBD_WRITE_ZEROES, fua && c->fua, NULL, (uint32_t) piece, offset };
      r = nbd_connection_request (c, &zeroes, deadline_us);
    }
  if (r == 0 && fua && !c->fua)
    r = flush_on (c, deadline_us);
  int err = errno;
  pool_give (p, c);
  errno = err;
  return r;
}

static int
mirror_flush_disk (struct mirror_session *s, unsigned disk, int64_t deadline_us)
{
  struct pool *p = &s->pools[disk];
  struct nbd_connection *c = pool_take (p, deadline_us);

  if (!c)
    return -1;
  int r = flush_on (c, deadline_us);
  int err = errno;
  pool_give (p, c);
  errno = err;
  return r;
}

static int
take_mutex (pthread_mutex_t *mu, int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);

  errno = pthread_mutex_clocklock (mu, CLOCK_MONOTONIC, &until);
  return errno ? -1 : 0;
}

static int
mirror_zero_extent (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                 uint64_t *length)
{
  struct pool *p = &s->pools[disk];

  if (take_mutex (&p->extents_mu, deadline_us) == -1)
    return -1;
  int r = nbd_connection_zero_extent (&p->extents, count, offset, deadline_us, zero, length);
  int err = errno;
  pthread_mutex_unlock (&p->extents_mu);
  errno = err;
  return r;
}

static int
mirror_super_read (struct mirror_session *s, uint8_t *file, int64_t deadline_us)
{
  struct nbd_connection *c = &s->superblock;

  if (take_mutex (&s->superblock_mu, deadline_us) == -1)
    return -1;
  int r = nbd_connection_wait (c, nbd_aio_pread (c->nbd, file, SUPERBLOCK_FILE_BYTES, 0, NBD_NULL_COMPLETION, 0), deadline_us);
  int err = errno;
  pthread_mutex_unlock (&s->superblock_mu);
  errno = err;
  return r;
}

static int
mirror_super_write (struct mirror_session *s, const uint8_t *slot, uint32_t count, uint64_t offset, int64_t deadline_us)
{
  struct nbd_connection *c = &s->superblock;

  if (take_mutex (&s->superblock_mu, deadline_us) == -1)
    return -1;
  int r = write_piece (c, slot, count, offset, false, deadline_us);
  if (r == 0)
    r = flush_on (c, deadline_us);
  int err = errno;
  pthread_mutex_unlock (&s->superblock_mu);
  errno = err;
  return r;
}

static void
mirror_abandon (struct mirror_session *s)
{
  for (unsigned i = 0; i < s->mirror->config->disk_count; i++) {
    struct pool *p = &s->pools[i];
    LOCK_FOR_CURRENT_SCOPE (&p->mu);
    p->abandoned = true;
    pthread_cond_broadcast (&p->returned);
    for (unsigned c = 0; c < p->count; c++)
      nbd_connection_wake (&p->connections[c]);
    nbd_connection_wake (&p->extents);
  }
  nbd_connection_wake (&s->superblock);
}

static const struct mirror_dev_ops nbd_mirror_ops = {
  .open = mirror_open,
  .pwrite = mirror_write,
  .zero = mirror_zero,
  .flush = mirror_flush_disk,
  .zero_extent = mirror_zero_extent,
  .super_read = mirror_super_read,
  .super_write = mirror_super_write,
  .abandon = mirror_abandon,
  .close = session_free,
};

struct mirror_dev *
nbd_mirror_new (const struct config *config)
{
  struct nbd_mirror *m = calloc (1, sizeof *m);

  if (!m)
    return NULL;
  m->dev.ops = &nbd_mirror_ops;
  m->config = config;
  return &m->dev;
}

void
nbd_mirror_free (struct mirror_dev *dev)
{
  free (dev);
}
