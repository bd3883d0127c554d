/* The dirty map's file: made all dirty, kept over a reopen, and never believed when anything of it is wrong. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>

#include "check.h"
#include "crc32.h"
#include "dirty_map.h"
#include "granule.h"
#include "le_bytes.h"
#include "scratch.h"
#include "vm_layout.h"

#define DISK_BYTES (UINT64_C (100) * GRANULE_BYTES + 512)
#define GRANULES 101

static const struct dirty_map_identity identity
  = { .uuid = { 1, 2, 3 }, .disk_name = "disk0", .disk_size_bytes = DISK_BYTES, .generation = 7 };
static char folder[64], path[128];

static void
make (void)
{
  struct dirty_map map;
  char why[256];

  unlink (path);
  CHECK (dirty_map_open (&map, path, &identity, why, sizeof why) == 0);
  dirty_map_close (&map);
}

static void
new_map_is_all_dirty_and_keeps_what_is_cleared (void)
{
  struct dirty_map map;
  struct stat st;
  char why[256];

  make ();
  CHECK (stat (path, &st) == 0 && st.st_size == 8192);
  CHECK (st.st_blocks * 512 >= st.st_size); /* allocated: a full file system cannot become SIGBUS */
  CHECK (dirty_map_open (&map, path, &identity, why, sizeof why) == 0);
  for (uint64_t g = 0; g < GRANULES; g++)
    CHECK (dirty_map_has (&map, g));
  for (uint64_t g = 0; g < GRANULES; g += 2)
    dirty_map_clear (&map, g);
  dirty_map_set (&map, 10, 3);
  CHECK (dirty_map_sync (&map) == 0);
  dirty_map_close (&map);
  CHECK (dirty_map_open (&map, path, &identity, why, sizeof why) == 0);
  for (uint64_t g = 0; g < GRANULES; g++)
    CHECK (dirty_map_has (&map, g) == (g % 2 == 1 || (g >= 10 && g < 13)));
  dirty_map_close (&map);
}

static void
patch (size_t offset, const void *bytes, size_t size, bool fix_crc)
{
  uint8_t head[VM_DIRTY_MAP_SIZE];
  int fd = open (path, O_RDWR);

  CHECK (fd != -1 && pread (fd, head, sizeof head, 0) == sizeof head);
  memcpy (head + offset, bytes, size);
  if (fix_crc) {
    le32_put (head, VM_DIRTY_MAP_OFF_CRC, 0);
    le32_put (head, VM_DIRTY_MAP_OFF_CRC, crc32_update (0, head, sizeof head));
  }
  CHECK (pwrite (fd, head, sizeof head, 0) == sizeof head);
  close (fd);
}

static void
is_refused (const char *field)
{
  struct dirty_map map;
  struct stat before, after;
  char why[256];

  CHECK (stat (path, &before) == 0);
  CHECK (dirty_map_open (&map, path, &identity, why, sizeof why) == -1);
  if (!strstr (why, field) || !strstr (why, path)) {
    fprintf (stderr, "%s: wanted %s\n", why, field);
    abort ();
  }
  CHECK (stat (path, &after) == 0 && after.st_size == before.st_size);
}

static void
each_wrong_field_is_named (void)
{
  static const struct {
    const char *field;
    size_t offset;
    uint64_t value;
    size_t size;
  } wrong[] = {
    { "magic", VM_DIRTY_MAP_OFF_MAGIC, 0x4141, 2 },
    { "version", VM_DIRTY_MAP_OFF_VERSION, 2, 4 },
    { "uuid", VM_DIRTY_MAP_OFF_UUID, 9, 1 },
    { "disk_size_bytes", VM_DIRTY_MAP_OFF_DISK_SIZE_BYTES, DISK_BYTES + 512, 8 },
    { "disk_size_bytes", VM_DIRTY_MAP_OFF_DISK_SIZE_BYTES, UINT64_MAX, 8 },
    { "granule_bytes", VM_DIRTY_MAP_OFF_GRANULE_BYTES, 4096, 8 },
    { "disk_name", VM_DIRTY_MAP_OFF_DISK_NAME + 4, '1', 1 },
  };

  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    uint64_t value = htole64 (wrong[i].value);
    make ();
    patch (wrong[i].offset, &value, wrong[i].size, true);
    is_refused (wrong[i].field);
  }
  /* Without a fitting checksum nothing of the head is believed, whichever byte it is. */
  for (size_t offset = VM_DIRTY_MAP_LEN_MAGIC; offset < VM_DIRTY_MAP_SIZE; offset += 131) {
    make ();
    patch (offset, "\x5a", 1, false);
    is_refused ("crc");
  }
}

static void
wrong_sizes_and_bits_beyond_the_end_are_refused (void)
{
  uint8_t bit = 0x20;

  make ();
  CHECK (truncate (path, 100) == 0);
  is_refused ("size");
  make ();
  CHECK (truncate (path, 8191) == 0);
  is_refused ("size");
  make ();
  CHECK (truncate (path, 12288) == 0);
  is_refused ("size");
  make ();
  int fd = open (path, O_RDWR);
  CHECK (pwrite (fd, &bit, 1, VM_DIRTY_MAP_SIZE + GRANULES / 8) == 1); /* granule 101 */
  close (fd);
  is_refused ("bitmap");
}

static void
no_space_is_an_error_and_leaves_no_half_map (void)
{
  struct rlimit all, little = { 4096, 4096 };
  struct dirty_map map;
  char why[256];

  unlink (path);
  signal (SIGXFSZ, SIG_IGN);
  CHECK (getrlimit (RLIMIT_FSIZE, &all) == 0);
  little.rlim_max = all.rlim_max;
  CHECK (setrlimit (RLIMIT_FSIZE, &little) == 0);
  CHECK (dirty_map_open (&map, path, &identity, why, sizeof why) == -1);
  CHECK (access (path, F_OK) == -1 && errno == ENOENT);
  CHECK (setrlimit (RLIMIT_FSIZE, &all) == 0);
}

int
main (void)
{
  scratch_make (folder);
  snprintf (path, sizeof path, "%s/disk0.dirty", folder);
  new_map_is_all_dirty_and_keeps_what_is_cleared ();
  each_wrong_field_is_named ();
  wrong_sizes_and_bits_beyond_the_end_are_refused ();
  no_space_is_an_error_and_leaves_no_half_map ();
  scratch_remove (folder);
  return 0;
}
