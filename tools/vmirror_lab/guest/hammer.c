/* Writes without order all over a disk, for tests of copies that are made meanwhile.
 *
 * Four threads write at random places of the last 32 MiB of each target: 512 bytes to 64 KiB at a
 * time, over and over each other, now and then a range of zeroes or a discard, seldom a flush.
 * Every sector says what it is (where it belongs, which operation wrote it, a sum), so that any copy
 * can be checked alone: a sector is zero or whole, and stands where it says.
 *
 * No two requests in flight touch the same sector (each thread has its own part), and none is in
 * flight from memory that changes (O_DIRECT): whoever sends either to two disks may find them
 * different, as MD RAID1 and DRBD do, and a test that compares two disks would test that instead.
 *
 *   hammer run [-p PORT] [-s SEED] TARGET...   until killed; ACK on every 256th operation, ERR ends it
 *   hammer scan TARGET...                      print "HAMMER sectors=.. zero=.. bad=.."
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "content.h"

#define SECTOR_BYTES 512u
#define REQUEST_BYTES_MAX 65536u
#define PAGE_BYTES 4096u
#define SPAN_BYTES (32u << 20)
#define TARGETS_MAX 8
#define THREADS 4u
#define REPORT_EVERY 256u

struct sector {
  char magic[8];
  uint64_t number; /* of the sector on its target */
  uint64_t operation;
  uint32_t thread;
  uint32_t crc; /* over the sector with this field zero */
  uint64_t payload[(SECTOR_BYTES - 32) / 8];
};
_Static_assert (sizeof (struct sector) == SECTOR_BYTES, "one sector");

struct target {
  int fd;
  int is_device;
  uint64_t first_byte; /* of the span */
  uint64_t span_bytes;
};

static struct target targets[TARGETS_MAX];
static unsigned target_count;
static uint64_t seed = 1;

/* Protects the port and the number of finished operations. */
static pthread_mutex_t report_lock = PTHREAD_MUTEX_INITIALIZER;
static int port = STDOUT_FILENO;
static uint64_t finished;

static void
die (const char *what)
{
  fprintf (stderr, "hammer: %s: %s\n", what, strerror (errno));
  exit (2);
}

static void
report (const char *word, uint64_t number, int error)
{
  char line[64];
  int n = error ? snprintf (line, sizeof line, "%s %llu %d\n", word, (unsigned long long) number, error)
                : snprintf (line, sizeof line, "%s %llu\n", word, (unsigned long long) number);

  if (write (port, line, (size_t) n) != n)
    exit (3);
}

/* Targets exist.  A file gets the span's size; of a device the last part is used, whatever lies before it stays. */
static void
open_targets (int argc, char **argv, int writable)
{
  if (argc < 1 || argc > TARGETS_MAX) {
    fprintf (stderr, "hammer: 1 to %d targets\n", TARGETS_MAX);
    exit (2);
  }
  for (int i = 0; i < argc; i++) {
    struct target *t = &targets[target_count++];
    struct stat st;

    t->fd = open (argv[i], (writable ? O_RDWR | O_DIRECT : O_RDONLY) | O_CLOEXEC);
    if (t->fd == -1 || fstat (t->fd, &st) == -1)
      die (argv[i]);
    t->is_device = S_ISBLK (st.st_mode);
    if (writable && !t->is_device && st.st_size < (off_t) SPAN_BYTES && ftruncate (t->fd, SPAN_BYTES) == -1)
      die (argv[i]);
    off_t end = lseek (t->fd, 0, SEEK_END);
    if (end < (off_t) (THREADS * REQUEST_BYTES_MAX)) {
      errno = ENOSPC;
      die (argv[i]);
    }
    uint64_t size = (uint64_t) end / PAGE_BYTES * PAGE_BYTES;
    t->span_bytes = size < SPAN_BYTES ? size / (THREADS * PAGE_BYTES) * THREADS * PAGE_BYTES : SPAN_BYTES;
    t->first_byte = size - t->span_bytes;
  }
}

static void
fill (unsigned char *buffer, uint64_t length, uint64_t offset, uint64_t operation, uint32_t thread)
{
  for (uint64_t done = 0; done < length; done += SECTOR_BYTES) {
    struct sector *s = (struct sector *) (void *) (buffer + done);
    memset (s, 0, sizeof *s);
    memcpy (s->magic, "VMHAMMER", 8);
    s->number = (offset + done) / SECTOR_BYTES;
    s->operation = operation;
    s->thread = thread;
    for (size_t i = 0; i < sizeof s->payload / 8; i++)
      s->payload[i] = scramble (s->number * 64 + i) ^ operation;
    s->crc = crc32 (s, sizeof *s);
  }
}

static int
erase (const struct target *t, uint64_t offset, uint64_t length, int discard)
{
  int mode = FALLOC_FL_KEEP_SIZE | (discard ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
  uint64_t range[2] = { offset, length };
  int r = t->is_device && discard ? ioctl (t->fd, BLKDISCARD, range)
                                  : fallocate (t->fd, mode, (off_t) offset, (off_t) length);

  return r == -1 && errno == EOPNOTSUPP ? 0 : r; /* not every disk can, and none must */
}

/* One operation of one thread; 0 or -1 with errno. */
static int
operate (const struct target *t, unsigned thread, uint64_t operation, uint64_t random, unsigned char *buffer)
{
  uint64_t part = t->span_bytes / THREADS, start = t->first_byte + thread * part;
  uint64_t length = (1 + random % (REQUEST_BYTES_MAX / SECTOR_BYTES)) * SECTOR_BYTES;
  uint64_t at = scramble (random) % ((part - length) / SECTOR_BYTES + 1) * SECTOR_BYTES;

  switch (operation % 16) {
  case 7:
  case 15: {
    uint64_t first = at / PAGE_BYTES * PAGE_BYTES;
    uint64_t pages = (length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    return erase (t, start + first, pages > part - first ? part - first : pages, operation % 16 == 7);
  }
  default:
    fill (buffer, length, start + at, operation, thread);
    ssize_t n = pwrite (t->fd, buffer, length, (off_t) (start + at));
    if (n >= 0 && (uint64_t) n != length) {
      errno = EIO;
      return -1;
    }
    if (n == -1)
      return -1;
    return operation % 64 == 63 ? fdatasync (t->fd) : 0;
  }
}

static void *
hammer (void *argument)
{
  unsigned thread = (unsigned) (uintptr_t) argument;
  unsigned char *buffer;

  if (posix_memalign ((void **) &buffer, PAGE_BYTES, REQUEST_BYTES_MAX) != 0)
    die ("memory");
  for (uint64_t operation = 0;; operation++) {
    uint64_t random = scramble (seed ^ scramble (operation * THREADS + thread));
    int error = operate (&targets[operation / 2 % target_count], thread, operation, random, buffer) == -1 ? errno : 0;

    pthread_mutex_lock (&report_lock);
    if (error) {
      report ("ERR", finished, error);
      exit (1);
    }
    if (++finished % REPORT_EVERY == 0)
      report ("ACK", finished, 0);
    pthread_mutex_unlock (&report_lock);
  }
}

static int
is_zero (const struct sector *s)
{
  static const struct sector zero;
  return memcmp (s, &zero, sizeof zero) == 0;
}

static int
scan (void)
{
  static struct sector sectors[REQUEST_BYTES_MAX / SECTOR_BYTES];
  unsigned long long whole = 0, zero = 0, bad = 0;

  for (unsigned i = 0; i < target_count; i++)
    for (uint64_t done = 0; done < targets[i].span_bytes;) {
      uint64_t offset = targets[i].first_byte + done, left = targets[i].span_bytes - done;
      size_t wanted = left < sizeof sectors ? (size_t) left : sizeof sectors;
      if (pread (targets[i].fd, sectors, wanted, (off_t) offset) != (ssize_t) wanted)
        die ("read");
      for (size_t s = 0; s < wanted / SECTOR_BYTES; s++) {
        uint32_t crc = sectors[s].crc;
        if (is_zero (&sectors[s])) {
          zero++;
          continue;
        }
        sectors[s].crc = 0;
        if (memcmp (sectors[s].magic, "VMHAMMER", 8) == 0 && sectors[s].number == offset / SECTOR_BYTES + s
            && crc32 (&sectors[s], SECTOR_BYTES) == crc)
          whole++;
        else
          bad++;
      }
      done += wanted;
    }
  printf ("HAMMER sectors=%llu zero=%llu bad=%llu\n", whole, zero, bad);
  return bad != 0;
}

int
main (int argc, char **argv)
{
  int option;
  const char *verb = argc > 1 ? argv[1] : "";
  int running = strcmp (verb, "run") == 0;

  if (!running && strcmp (verb, "scan") != 0) {
    fprintf (stderr, "usage: hammer run [-p PORT] [-s SEED] TARGET... | hammer scan TARGET...\n");
    return 2;
  }
  argc--, argv++;
  while ((option = getopt (argc, argv, "p:s:")) != -1)
    switch (option) {
    case 'p':
      port = open (optarg, O_WRONLY | O_CLOEXEC);
      if (port == -1)
        die (optarg);
      break;
    case 's':
      seed = strtoull (optarg, NULL, 10);
      break;
    default:
      return 2;
    }
  open_targets (argc - optind, argv + optind, running);
  if (!running)
    return scan ();
  crc32 ("", 0); /* the table is there before the threads are */
  for (uintptr_t i = 1; i < THREADS; i++) {
    pthread_t thread;
    if ((errno = pthread_create (&thread, NULL, hammer, (void *) i)) != 0)
      die ("thread");
  }
  hammer ((void *) 0);
  return 0;
}
