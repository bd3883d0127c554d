/* The nbdkit front end: NBD exports disk0 ... whose writes, zeroes and flushes are mirrored and then always
 * answered ENOSPC (the abstention: the source's result is the guest's result, facts of QEMU's quorum), and
 * whose reads are answered EIO.  Nothing is logged for an abstained request.
 *
 *   nbdkit -f -t 16 nbdkit-vmirror-plugin.so config=STATE/filter.json
 *
 * Worker threads of nbdkit bring a request to the mirror themselves and wait for it: no hand-over.
 */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "config.h"
#include "control.h"
#include "file_mirror.h"
#include "filter.h"
#include "log.h"
#include "nbd_mirror.h"
#include "nbd_source.h"
#include "notify.h"
#include "scope.h"
#include "tee.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define REQUEST_MAX (32u << 20)

static char *config_path;
static struct config config;
static struct mirror_dev *mirror;
static struct source_dev *source;
static struct filter *filter;
static struct control *control;
static struct notify *notify;
static pthread_t exit_thread;
static bool exit_thread_started, unloading, stopped, all_ended = true;

static int
vm_config (const char *key, const char *value)
{
  if (strcmp (key, "config") != 0) {
    nbdkit_error ("unknown parameter %s; config=FILE is the only one", key);
    return -1;
  }
  free (config_path);
  config_path = nbdkit_absolute_path (value);
  return config_path ? 0 : -1;
}

static int
vm_config_complete (void)
{
  char why[512];

  if (!config_path) {
    nbdkit_error ("config=FILE is missing");
    return -1;
  }
  if (config_load (&config, config_path, why, sizeof why) == -1) {
    nbdkit_error ("%s", why);
    return -1;
  }
  return 0;
}

/* The end, by whichever way it comes first: nothing runs twice, and the second caller waits. */
static void
stop_once (void)
{
  static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;

  LOCK_FOR_CURRENT_SCOPE (&mu);
  if (stopped || !filter)
    return;
  stopped = true;
  all_ended = filter_stop (filter);
}

/* On SIGTERM nbdkit waits until its clients have gone by themselves, but the source's hypervisor stays for
   ever.  nbdkit_nanosleep returns early when nbdkit is about to end: then the filter is stopped in good order
   here, and the process ends under its clients; they connect again to the next one. */
static void *
exit_main (void *opaque)
{
  (void) opaque;
  while (nbdkit_nanosleep (3600, 0) == 0)
    continue;
  stop_once ();
  if (__atomic_load_n (&unloading, __ATOMIC_ACQUIRE))
    return NULL;
  unlink (config.control_socket);
  _exit (0);
}

/* After nbdkit's fork (it stays in the foreground under the supervisor, but must not matter): threads. */
static int
vm_after_fork (void)
{
  log_set_vm (config.vm);
  mirror = config.mirror_type == MIRROR_NBD ? nbd_mirror_new (&config) : file_mirror_new (&config);
  source = nbd_source_new ();
  filter = mirror && source ? filter_new (&config, mirror, source) : NULL;
  if (!filter) {
    nbdkit_error ("no memory");
    return -1;
  }
  if (filter_start_threads (filter) == -1) {
    nbdkit_error ("threads: %m");
    return -1;
  }
  control = control_start (filter, config.control_socket);
  if (!control) {
    nbdkit_error ("control socket %s: %m", config.control_socket);
    return -1;
  }
  notify = notify_start (filter);
  if (!notify && errno) {
    nbdkit_error ("NOTIFY_SOCKET: %m");
    return -1;
  }
  errno = pthread_create (&exit_thread, NULL, exit_main, NULL);
  if (errno) {
    nbdkit_error ("threads: %m");
    return -1;
  }
  exit_thread_started = true;
  return 0;
}

static void
vm_unload (void)
{
  struct timespec until = deadline_timespec (in_ms (1000));

  __atomic_store_n (&unloading, true, __ATOMIC_RELEASE);
  stop_once ();
  /* Code and memory are about to go: nothing may still use them. */
  if ((exit_thread_started && pthread_clockjoin_np (exit_thread, NULL, CLOCK_MONOTONIC, &until) != 0) || !all_ended) {
    unlink (config.control_socket);
    _exit (0);
  }
  control_stop (control);
  notify_stop (notify);
  if (filter)
    filter_free (filter);
  if (mirror)
    config.mirror_type == MIRROR_NBD ? nbd_mirror_free (mirror) : file_mirror_free (mirror);
  if (source)
    nbd_source_free (source);
  free (config_path);
}

static int
vm_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  (void) readonly;
  (void) is_tls;
  for (unsigned i = 0; i < config.disk_count; i++)
    if (nbdkit_add_export (exports, config.disks[i].name, NULL) == -1)
      return -1;
  return 0;
}

static void *
vm_open (int readonly)
{
  const char *name = nbdkit_export_name ();
  struct client *client;

  (void) readonly;
  for (unsigned i = 0; name && i < config.disk_count; i++) {
    if (strcmp (name, config.disks[i].name) != 0)
      continue;
    client = calloc (1, sizeof *client);
    if (!client) {
      nbdkit_error ("no memory");
      return NULL;
    }
    if (client_open (client, &filter->disks[i]) == 0)
      return client;
    nbdkit_error ("requests of an older connection to %s have not ended yet", name);
    client_close (client);
    free (client);
    return NULL;
  }
  nbdkit_error ("there is no export %s", name ? name : "");
  nbdkit_set_error (ENOENT);
  return NULL;
}

static void
vm_close (void *handle)
{
  client_close (handle);
  free (handle);
}

static int64_t
vm_get_size (void *handle)
{
  const struct client *client = handle;

  return (int64_t) client->disk->config->size_bytes;
}

static int
vm_yes (void *handle)
{
  (void) handle;
  return 1;
}

static int
vm_no (void *handle)
{
  (void) handle;
  return 0;
}

static int
vm_can_fua (void *handle)
{
  (void) handle;
  return NBDKIT_FUA_NATIVE;
}

static int
vm_block_size (void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  (void) handle;
  *minimum = 512;
  *preferred = 4096;
  *maximum = REQUEST_MAX;
  return 0;
}

static int
abstain (void)
{
  errno = ENOSPC;
  return -1;
}

static int
vm_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void) handle;
  (void) buf;
  (void) count;
  (void) offset;
  (void) flags;
  errno = EIO;
  return -1;
}

static int
vm_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  tee_write (handle, buf, count, offset, flags & NBDKIT_FLAG_FUA);
  return abstain ();
}

static int
vm_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  tee_zero (handle, count, offset, flags & NBDKIT_FLAG_FUA);
  return abstain ();
}

static int
vm_flush (void *handle, uint32_t flags)
{
  (void) flags;
  tee_flush (handle);
  return abstain ();
}

static struct nbdkit_plugin plugin = {
  .name = "vmirror",
  .longname = "vmirror filter",
  .version = VM_VERSION,
  .description = "mirrors what a running VM writes, and abstains",
  .config = vm_config,
  .config_complete = vm_config_complete,
  .config_help = "config=FILE   (required) the filter's JSON config file",
  .after_fork = vm_after_fork,
  .unload = vm_unload,
  .list_exports = vm_list_exports,
  .open = vm_open,
  .close = vm_close,
  .get_size = vm_get_size,
  .can_write = vm_yes,
  .can_flush = vm_yes,
  .can_fua = vm_can_fua,
  .can_zero = vm_yes,
  /* Zeroing can be as slow as writing on the mirror: nobody is told that it is fast. */
  .can_fast_zero = vm_no,
  .can_trim = vm_no,
  .can_multi_conn = vm_no, /* one connection per disk is the source's; a second one takes its place */
  .can_extents = vm_no,
  .is_rotational = vm_no,
  .block_size = vm_block_size,
  .pread = vm_pread,
  .pwrite = vm_pwrite,
  .zero = vm_zero,
  .flush = vm_flush,
  .errno_is_preserved = 1,
};

NBDKIT_REGISTER_PLUGIN (plugin)
