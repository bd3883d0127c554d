#include "nbd_source.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "nbd_connection.h"
#include "text.h"

#define BITMAP_CONTEXT "qemu:dirty-bitmap:"
#define BITMAP_STEP (UINT64_C (1) << 30)
/* NBD extents of QEMU's dirty bitmaps: flag NBD_STATE_DIRTY (docs/interop/nbd.txt of QEMU). */
#define STATE_DIRTY 1u

struct source_reader {
  struct nbd_connection connection;
  char context[sizeof BITMAP_CONTEXT + 256]; /* "": no bitmap */
  uint64_t size_bytes;
};

static void
source_close (struct source_reader *r)
{
  nbd_connection_close (&r->connection);
  free (r);
}

static struct source_reader *
source_open (struct source_dev *dev, const char *socket, const char *export_name, const char *bitmap, uint64_t size_bytes,
             int64_t deadline_us, char *fault)
{
  struct source_reader *r = calloc (1, sizeof *r);

  (void) dev;
  if (!r) {
    text_copy (fault, MIRROR_FAULT_SIZE, "no memory");
    return NULL;
  }
  struct nbd_wanted wanted = { .socket = socket,
                               .export_name = export_name,
                               .extents = true,
                               .bitmap = bitmap,
                               .size_bytes = size_bytes };
  r->size_bytes = size_bytes;
  int result = nbd_connection_open (&r->connection, &wanted, deadline_us, fault);
  if (result == 0 && bitmap) {
    text_format (r->context, sizeof r->context, BITMAP_CONTEXT "%s", bitmap);
    if (nbd_can_meta_context (r->connection.nbd, r->context) != 1) {
      text_format (fault, MIRROR_FAULT_SIZE, "export %.64s has no dirty bitmap %.64s", export_name, bitmap);
      result = -1;
    }
  }
  if (result == 0)
    return r;
  source_close (r);
  return NULL;
}

static int
source_pread (struct source_reader *r, void *buf, uint32_t count, uint64_t offset, int64_t deadline_us)
{
  struct nbd_connection *c = &r->connection;

  return nbd_connection_wait (c, nbd_aio_pread (c->nbd, buf, count, offset, NBD_NULL_COMPLETION, 0), deadline_us);
}

static int
source_zero_extent (struct source_reader *r, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                    uint64_t *length)
{
  return nbd_connection_zero_extent (&r->connection, count, offset, deadline_us, zero, length);
}

struct bitmap_walk {
  const char *context;
  uint64_t at, end;
  source_dirty_fn *dirty;
  void *opaque;
};

static int
on_bitmap_extents (void *opaque, const char *context, uint64_t offset, uint32_t *entries, size_t count, int *error)
{
  struct bitmap_walk *w = opaque;

  (void) error;
  if (strcmp (context, w->context) != 0 || offset != w->at)
    return 0;
  for (size_t i = 0; i + 1 < count && w->at < w->end; i += 2) {
    uint64_t length = entries[i] < w->end - w->at ? entries[i] : w->end - w->at;
    if (length && entries[i + 1] & STATE_DIRTY)
      w->dirty (w->opaque, w->at, length);
    w->at += length;
  }
  return 0;
}

static int
source_dirty_extents (struct source_reader *r, int64_t deadline_us, source_dirty_fn *dirty, void *opaque)
{
  struct nbd_connection *c = &r->connection;
  struct bitmap_walk walk = { .context = r->context, .end = r->size_bytes, .dirty = dirty, .opaque = opaque };
  nbd_extent_callback callback = { .callback = on_bitmap_extents, .user_data = &walk };

  while (walk.at < walk.end) {
    uint64_t at = walk.at, count = walk.end - at < BITMAP_STEP ? walk.end - at : BITMAP_STEP;
    if (nbd_connection_wait (c, nbd_aio_block_status (c->nbd, count, at, callback, NBD_NULL_COMPLETION, 0), deadline_us)
        == -1)
      return -1;
    if (walk.at == at) { /* the server said nothing about our context: never take that for clean */
      errno = EPROTO;
      return -1;
    }
  }
  return 0;
}

static void
source_abandon (struct source_reader *r)
{
  nbd_connection_wake (&r->connection);
}

static const struct source_dev_ops nbd_source_ops = {
  .open = source_open,
  .pread = source_pread,
  .zero_extent = source_zero_extent,
  .dirty_extents = source_dirty_extents,
  .abandon = source_abandon,
  .close = source_close,
};

struct source_dev *
nbd_source_new (void)
{
  struct source_dev *dev = calloc (1, sizeof *dev);

  if (dev)
    dev->ops = &nbd_source_ops;
  return dev;
}

void
nbd_source_free (struct source_dev *dev)
{
  free (dev);
}
