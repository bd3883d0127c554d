#include "dirty_map.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32.h"
#include "durable_file.h"
#include "granule.h"
#include "le_bytes.h"
#include "scope.h"
#include "text.h"
#include "vm_layout.h"

#define HEAD_BYTES VM_DIRTY_MAP_SIZE

/* Bits are addressed as bytes on disk and as 64-bit words in memory. */
_Static_assert (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the bitmap is little-endian");

static size_t
file_bytes (uint64_t granules)
{
  uint64_t bits = (granules + 7) / 8;

  return HEAD_BYTES + (size_t) ((bits + 4095) / 4096 * 4096);
}

static uint32_t
head_crc (const uint8_t *head)
{
  static const uint8_t zero[4];
  uint32_t crc = crc32_update (0, head, VM_DIRTY_MAP_OFF_CRC);

  crc = crc32_update (crc, zero, sizeof zero);
  return crc32_update (crc, head + VM_DIRTY_MAP_OFF_CRC + 4, HEAD_BYTES - VM_DIRTY_MAP_OFF_CRC - 4);
}

static void
build_head (uint8_t *head, const struct dirty_map_identity *id)
{
  memset (head, 0, HEAD_BYTES);
  memcpy (head + VM_DIRTY_MAP_OFF_MAGIC, VM_DIRTY_MAP_MAGIC, VM_DIRTY_MAP_LEN_MAGIC);
  le32_put (head, VM_DIRTY_MAP_OFF_VERSION, VM_DIRTY_MAP_VERSION);
  le64_put (head, VM_DIRTY_MAP_OFF_SEQUENCE, 1);
  memcpy (head + VM_DIRTY_MAP_OFF_UUID, id->uuid, 16);
  le64_put (head, VM_DIRTY_MAP_OFF_DISK_SIZE_BYTES, id->disk_size_bytes);
  le64_put (head, VM_DIRTY_MAP_OFF_GRANULE_BYTES, GRANULE_BYTES);
  le64_put (head, VM_DIRTY_MAP_OFF_GENERATION, id->generation);
  text_copy ((char *) head + VM_DIRTY_MAP_OFF_DISK_NAME, VM_DIRTY_MAP_LEN_DISK_NAME, id->disk_name);
  le32_put (head, VM_DIRTY_MAP_OFF_CRC, head_crc (head));
}

/* NULL, or which field is wrong and how. */
static const char *
head_fault (const uint8_t *head, const struct dirty_map_identity *id, char *text, size_t size)
{
  if (memcmp (head + VM_DIRTY_MAP_OFF_MAGIC, VM_DIRTY_MAP_MAGIC, VM_DIRTY_MAP_LEN_MAGIC) != 0)
    return "magic: this is not a dirty map";
  if (le32_at (head, VM_DIRTY_MAP_OFF_CRC) != head_crc (head))
    return "crc: the head is damaged";
  if (le32_at (head, VM_DIRTY_MAP_OFF_VERSION) != VM_DIRTY_MAP_VERSION) {
    text_format (text, size, "version: %" PRIu32 ", this program knows %d", le32_at (head, VM_DIRTY_MAP_OFF_VERSION),
                 VM_DIRTY_MAP_VERSION);
    return text;
  }
  if (memcmp (head + VM_DIRTY_MAP_OFF_UUID, id->uuid, 16) != 0) {
    char other[UUID_TEXT_SIZE];
    uuid_format (head + VM_DIRTY_MAP_OFF_UUID, other);
    text_format (text, size, "uuid: it belongs to protection %s", other);
    return text;
  }
  if (le64_at (head, VM_DIRTY_MAP_OFF_DISK_SIZE_BYTES) != id->disk_size_bytes) {
    text_format (text, size, "disk_size_bytes: %" PRIu64 ", the disk has %" PRIu64,
                 le64_at (head, VM_DIRTY_MAP_OFF_DISK_SIZE_BYTES), id->disk_size_bytes);
    return text;
  }
  if (le64_at (head, VM_DIRTY_MAP_OFF_GRANULE_BYTES) != GRANULE_BYTES)
    return "granule_bytes: not 65536";
  if (strncmp ((const char *) head + VM_DIRTY_MAP_OFF_DISK_NAME, id->disk_name, VM_DIRTY_MAP_LEN_DISK_NAME) != 0)
    return "disk_name: it belongs to another disk";
  return NULL;
}

static void
set_all (struct dirty_map *map)
{
  dirty_map_set (map, 0, map->granules);
}

/* Made under another name and renamed when whole: a crash leaves no half map under the real name. */
static int
create (const char *path, const struct dirty_map_identity *id)
{
  char temporary[4096];
  size_t size = file_bytes (granules_for_size (id->disk_size_bytes));

  if (snprintf (temporary, sizeof temporary, "%s.new", path) >= (int) sizeof temporary) {
    errno = ENAMETOOLONG;
    return -1;
  }
  CLEANUP_CLOSE int fd = open (temporary, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd == -1)
    return -1;
  int r = posix_fallocate (fd, 0, (off_t) size);
  if (r != 0) {
    unlink (temporary);
    errno = r;
    return -1;
  }
  uint8_t *base = mmap (NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED)
    return -1;
  struct dirty_map map = { .granules = granules_for_size (id->disk_size_bytes),
                           .words = (uint64_t *) (void *) (base + HEAD_BYTES) };
  build_head (base, id);
  set_all (&map);
  munmap (base, size);
  if (fsync (fd) == -1 || rename (temporary, path) == -1)
    return -1;
  return durable_sync_directory_of (path);
}

static bool
padding_is_zero (const struct dirty_map *map)
{
  size_t words = (map->map_bytes - HEAD_BYTES) / sizeof *map->words;
  size_t word = (size_t) (map->granules / 64);

  if (map->granules % 64 && map->words[word++] >> (map->granules % 64))
    return false;
  for (; word < words; word++)
    if (map->words[word])
      return false;
  return true;
}

int
dirty_map_open (struct dirty_map *map, const char *path, const struct dirty_map_identity *id, char *why, size_t why_size)
{
  char text[160];
  struct stat st;

  *map = (struct dirty_map) { .granules = granules_for_size (id->disk_size_bytes) };
  map->map_bytes = file_bytes (map->granules);
  CLEANUP_CLOSE int fd = open (path, O_RDWR | O_CLOEXEC);
  if (fd == -1 && errno == ENOENT) {
    if (create (path, id) == -1) {
      text_format (why, why_size, "dirty map %s cannot be made: %s", path, strerror (errno));
      return -1;
    }
    fd = open (path, O_RDWR | O_CLOEXEC);
  }
  if (fd == -1 || fstat (fd, &st) == -1) {
    text_format (why, why_size, "dirty map %s cannot be opened: %s", path, strerror (errno));
    return -1;
  }
  if (st.st_size < HEAD_BYTES || (uint64_t) st.st_size > SIZE_MAX) {
    text_format (why, why_size, "dirty map %s: size: %jd bytes, too short for its head", path, (intmax_t) st.st_size);
    return -1;
  }
  /* The head first: its field says more than a file size that follows from it. */
  CLEANUP_FREE uint8_t *head = malloc (HEAD_BYTES);
  if (!head || pread (fd, head, HEAD_BYTES, 0) != HEAD_BYTES) {
    text_format (why, why_size, "dirty map %s cannot be read: %s", path, strerror (errno));
    return -1;
  }
  const char *fault = head_fault (head, id, text, sizeof text);
  if (fault) {
    text_format (why, why_size, "dirty map %s: %s", path, fault);
    return -1;
  }
  if ((size_t) st.st_size != map->map_bytes) {
    text_format (why, why_size, "dirty map %s: size: %jd bytes instead of %zu", path, (intmax_t) st.st_size,
                 map->map_bytes);
    return -1;
  }
  /* MAP_POPULATE: an unreadable sector shows now and not in the middle of a guest's write. A file
     that somebody made sparse since is allocated again. */
  int r = posix_fallocate (fd, 0, st.st_size);
  if (r != 0) {
    text_format (why, why_size, "dirty map %s cannot be allocated: %s", path, strerror (r));
    return -1;
  }
  map->base = mmap (NULL, map->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (map->base == MAP_FAILED) {
    text_format (why, why_size, "dirty map %s cannot be mapped: %s", path, strerror (errno));
    map->base = NULL;
    return -1;
  }
  map->words = (uint64_t *) (void *) ((uint8_t *) map->base + HEAD_BYTES);
  if (!padding_is_zero (map)) {
    text_format (why, why_size, "dirty map %s: bitmap: bits are set beyond the end of the disk", path);
    dirty_map_close (map);
    return -1;
  }
  return 0;
}

void
dirty_map_close (struct dirty_map *map)
{
  if (map->base)
    munmap (map->base, map->map_bytes);
  *map = (struct dirty_map) { 0 };
}

void
dirty_map_set (struct dirty_map *map, uint64_t first, uint64_t count)
{
  assert (first <= map->granules && count <= map->granules - first);
  while (count) {
    uint64_t bit = first % 64;
    uint64_t here = 64 - bit < count ? 64 - bit : count;
    uint64_t ones = (here == 64 ? UINT64_MAX : (UINT64_C (1) << here) - 1) << bit;
    uint64_t *word = &map->words[first / 64];
    /* Looking first keeps the page clean when nothing changes: a busy granule costs no write-back. */
    if ((__atomic_load_n (word, __ATOMIC_RELAXED) & ones) != ones)
      __atomic_fetch_or (word, ones, __ATOMIC_SEQ_CST);
    first += here;
    count -= here;
  }
}

void
dirty_map_clear (struct dirty_map *map, uint64_t granule)
{
  assert (granule < map->granules);
  __atomic_fetch_and (&map->words[granule / 64], ~(UINT64_C (1) << (granule % 64)), __ATOMIC_SEQ_CST);
}

bool
dirty_map_has (const struct dirty_map *map, uint64_t granule)
{
  assert (granule < map->granules);
  return __atomic_load_n (&map->words[granule / 64], __ATOMIC_SEQ_CST) >> (granule % 64) & 1;
}

int
dirty_map_sync (struct dirty_map *map)
{
  return msync (map->base, map->map_bytes, MS_SYNC);
}
