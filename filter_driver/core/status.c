#include "status.h"

#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "scope.h"
#include "text.h"

static json_t *
count (uint64_t n)
{
  return json_integer ((json_int_t) n);
}

static json_t *
histogram_json (const struct histogram *h)
{
  json_t *list = json_array ();

  for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
    json_array_append_new (list, count (__atomic_load_n (&h->buckets[i], __ATOMIC_RELAXED)));
  return list;
}

#define COUNTER(name) json_object_set_new (object, #name, count (__atomic_load_n (&c->name, __ATOMIC_RELAXED)))

static json_t *
counters_json (const struct counters *c)
{
  json_t *object = json_object ();

  COUNTER (writes);
  COUNTER (write_bytes);
  COUNTER (zeroes);
  COUNTER (zero_bytes);
  COUNTER (flushes);
  COUNTER (mirror_errors);
  COUNTER (mirror_timeouts);
  COUNTER (reconnects);
  COUNTER (resync_read_bytes);
  COUNTER (resync_sent_bytes);
  COUNTER (resync_zero_bytes);
  COUNTER (resync_skipped_fresh_bytes);
  return object;
}

static uint64_t
dirty_bytes (struct disk *d)
{
  uint64_t bytes = book_copy_granules (&d->book) * GRANULE_BYTES;

  return bytes < d->config->size_bytes ? bytes : d->config->size_bytes;
}

static json_t *
disk_json_locked (struct disk *d)
{
  json_t *object = json_object ();

  json_object_set_new (object, "name", json_string (d->config->name));
  json_object_set_new (object, "size_bytes", count (d->config->size_bytes));
  json_object_set_new (object, "dirty_bytes", count (dirty_bytes (d)));
  json_object_set_new (object, "client_connection", count (d->client_connection));
  json_object_set_new (object, "client_connected", json_boolean (d->client_connected));
  json_object_set_new (object, "needs_book", json_boolean (disk_needs_book_locked (d)));
  return object;
}

static json_t *
progress_json_locked (struct filter *f, uint64_t dirty)
{
  if (!f->copy || f->standing.phase != PHASE_COPYING)
    return json_null ();
  json_t *object = json_object ();
  int64_t elapsed_us = now_us () - f->copy_started_us;
  uint64_t done = f->copy_total_bytes > dirty ? f->copy_total_bytes - dirty : 0;

  json_object_set_new (object, "done_bytes", count (done));
  json_object_set_new (object, "total_bytes", count (f->copy_total_bytes));
  json_object_set_new (object, "bytes_per_s",
                       count (elapsed_us > 0 ? (uint64_t) ((double) done * 1e6 / (double) elapsed_us) : 0));
  return object;
}

/* What the user reads first: why this state, and what keeps it from getting better. */
static json_t *
reason_json_locked (const struct filter *f)
{
  char text[2 * REASON_SIZE + 16];

  if (f->probe_fault[0] && strcmp (f->probe_fault, f->cause) != 0)
    text_format (text, sizeof text, "%s; now: %s", f->cause, f->probe_fault);
  else
    text_copy (text, sizeof text, f->cause);
  json_t *reason = json_string (text);
  return reason ? reason : json_string ("(not valid UTF-8)");
}

json_t *
status_json (struct filter *f)
{
  char uuid[UUID_TEXT_SIZE];
  json_t *o = json_object (), *disks = json_array ();
  uint64_t dirty = 0;
  bool needs_book = false;

  uuid_format (f->config->protection, uuid);
  json_object_set_new (o, "protection", json_string (uuid));
  json_object_set_new (o, "vm", json_string (f->config->vm));
  json_object_set_new (o, "version", json_string (VM_VERSION));
  json_object_set_new (o, "pid", json_integer (getpid ()));
  json_object_set_new (o, "uptime_ms", json_integer ((now_us () - f->started_us) / 1000));
  json_object_set_new (o, "mode", json_string ("sync"));
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
    enum state state = state_of (&f->standing);
    for (unsigned i = 0; i < f->disk_count; i++) {
      dirty += dirty_bytes (&f->disks[i]);
      needs_book = needs_book || disk_needs_book_locked (&f->disks[i]);
      json_array_append_new (disks, disk_json_locked (&f->disks[i]));
    }
    int64_t last_sync_ms = state == STATE_MIRRORING ? unix_ms () : (int64_t) f->saved.last_sync_unix_ms;
    int64_t lag_ms = dirty && last_sync_ms ? unix_ms () - last_sync_ms : 0;
    json_object_set_new (o, "state", json_string (state_name (state)));
    json_object_set_new (o, "reason", reason_json_locked (f));
    json_object_set_new (o, "consistent", json_boolean (f->consistent));
    json_object_set_new (o, "generation", count (f->saved.generation));
    json_object_set_new (o, "lag_ms", json_integer (lag_ms > 0 ? lag_ms : 0));
    json_object_set_new (o, "dirty_bytes", count (dirty));
    json_object_set_new (o, "mirror_connected", json_boolean (f->standing.mirror_connected));
    json_object_set_new (o, "mirror_connection", count (f->connection));
    json_object_set_new (o, "needs_resync", json_boolean (state_needs_resync (&f->standing)));
    json_object_set_new (o, "needs_book", json_boolean (needs_book));
    json_object_set_new (o, "last_sync_unix_ms", json_integer (last_sync_ms));
    json_object_set_new (o, "progress", progress_json_locked (f, dirty));
  }
  json_object_set_new (o, "disks", disks);
  json_object_set_new (o, "counters", counters_json (&f->counters));
  json_t *latency = json_object ();
  json_object_set_new (latency, "write", histogram_json (&f->write_latency));
  json_object_set_new (latency, "flush", histogram_json (&f->flush_latency));
  json_object_set_new (o, "latency_us", latency);
  return o;
}

bool
status_has_progress (struct filter *f)
{
  LOCK_FOR_CURRENT_SCOPE (&f->mu);
  return f->copy != NULL;
}
