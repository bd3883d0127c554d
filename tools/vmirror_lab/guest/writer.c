/* The record writer of the lab's guest.
 *
 * Appends 4 KiB records with one global sequence over one or more targets (files or block devices):
 * record s goes to target s % N, slot s / N (round and round within the limit), then fdatasync; only
 * when that has succeeded it is reported as "ACK s" on the port.  What is acknowledged there must be
 * found on a mirror after a failover: whoever counts stands outside the VM and sees only the port.
 *
 *   writer scan TARGET...                 print "RECORDS first=.. last=.. count=.. bad=.."
 *   writer run [-p PORT] [-l MIB] TARGET...   go on after the last record; MIB per target are kept
 *   writer button                         wait for the ACPI power button
 *
 * count is the number of records up to the newest one, bad how many of those that must still be there
 * (not overwritten since) are not: a disk that lost a write in the middle.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "content.h"

#define RECORD_BYTES 4096u
#define TARGETS_MAX 8
#define INPUTS_MAX 16

struct record {
  char magic[8];
  uint64_t sequence;
  uint64_t time_ns;
  uint32_t crc;
  uint32_t zero;
  uint64_t payload[(RECORD_BYTES - 32) / 8];
};
_Static_assert (sizeof (struct record) == RECORD_BYTES, "a record is one page");

static int port = -1;

static void __attribute__ ((format (printf, 1, 2)))
report (const char *format, ...)
{
  char line[128];
  va_list ap;

  va_start (ap, format);
  int n = vsnprintf (line, sizeof line, format, ap);
  va_end (ap);
  if (write (port == -1 ? STDOUT_FILENO : port, line, (size_t) n) != n)
    exit (3);
}

static void
make_record (struct record *r, uint64_t sequence)
{
  struct timespec now;

  clock_gettime (CLOCK_REALTIME, &now);
  memset (r, 0, sizeof *r);
  memcpy (r->magic, "VMRECORD", 8);
  r->sequence = sequence;
  r->time_ns = (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
  for (size_t i = 0; i < sizeof r->payload / 8; i++)
    r->payload[i] = scramble (sequence * 512 + i);
  r->crc = crc32 (r, sizeof *r);
}

static int
valid_record (struct record *r)
{
  uint32_t crc = r->crc;

  if (memcmp (r->magic, "VMRECORD", 8) != 0)
    return 0;
  r->crc = 0;
  int same = crc32 (r, sizeof *r) == crc;
  r->crc = crc;
  return same;
}

struct targets {
  int fds[TARGETS_MAX];
  uint64_t limit[TARGETS_MAX]; /* records that fit */
  uint64_t count;
};

/* Targets exist: a name that is not there yet would become a file in the guest's memory. */
static void
open_targets (struct targets *t, int argc, char **argv, int flags, uint64_t limit_bytes)
{
  memset (t, 0, sizeof *t);
  if (argc < 1 || argc > TARGETS_MAX) {
    fprintf (stderr, "writer: 1 to %d targets\n", TARGETS_MAX);
    exit (2);
  }
  for (int i = 0; i < argc; i++) {
    struct stat st;
    t->fds[i] = open (argv[i], flags | O_CLOEXEC);
    if (t->fds[i] == -1 || fstat (t->fds[i], &st) == -1) {
      fprintf (stderr, "writer: %s: %s\n", argv[i], strerror (errno));
      exit (2);
    }
    uint64_t size = S_ISBLK (st.st_mode) ? (uint64_t) lseek (t->fds[i], 0, SEEK_END) : limit_bytes;
    t->limit[i] = (size < limit_bytes ? size : limit_bytes) / RECORD_BYTES;
    t->count++;
  }
}

static uint64_t
window (const struct targets *t)
{
  uint64_t slots = t->limit[0];

  for (uint64_t i = 1; i < t->count; i++)
    slots = t->limit[i] < slots ? t->limit[i] : slots;
  return slots * t->count;
}

/* Returns one more than the newest sequence; *bad: how many are missing that nothing has overwritten.
   The record after the newest may have been on its way, over the oldest. */
static uint64_t
scan (const struct targets *t, uint64_t *bad)
{
  static struct record r;
  uint64_t places = window (t), next = 0;
  uint64_t *found = calloc (places ? places : 1, sizeof *found);

  if (!found || !places) {
    fprintf (stderr, "writer: no room for a record\n");
    exit (2);
  }
  for (uint64_t place = 0; place < places; place++) {
    ssize_t n = pread (t->fds[place % t->count], &r, sizeof r, (off_t) (place / t->count * RECORD_BYTES));
    if (n != (ssize_t) sizeof r || !valid_record (&r) || r.sequence % places != place)
      continue;
    found[place] = r.sequence + 1;
    next = r.sequence >= next ? r.sequence + 1 : next;
  }
  *bad = 0;
  for (uint64_t s = next + 1 > places ? next + 1 - places : 0; s < next; s++)
    *bad += found[s % places] != s + 1;
  free (found);
  return next;
}

static int
run (struct targets *t)
{
  static struct record r;
  uint64_t bad, places = window (t), s = scan (t, &bad);

  for (;; s++) {
    int fd = t->fds[s % t->count];
    uint64_t slot = s % places / t->count;
    make_record (&r, s);
    errno = EIO; /* what a short write means here; a failure sets its own */
    if (pwrite (fd, &r, sizeof r, (off_t) (slot * RECORD_BYTES)) != (ssize_t) sizeof r || fdatasync (fd) == -1) {
      report ("ERR %llu %d\n", (unsigned long long) s, errno);
      return 1;
    }
    report ("ACK %llu\n", (unsigned long long) s);
  }
}

static int
wait_button (void)
{
  struct pollfd fds[INPUTS_MAX];
  nfds_t n = 0;

  for (int i = 0; i < INPUTS_MAX; i++) {
    char path[64];
    snprintf (path, sizeof path, "/dev/input/event%d", i);
    int fd = open (path, O_RDONLY | O_CLOEXEC);
    if (fd != -1)
      fds[n++] = (struct pollfd) { .fd = fd, .events = POLLIN };
  }
  while (n && poll (fds, n, -1) > 0)
    for (nfds_t i = 0; i < n; i++) {
      struct input_event event;
      if (fds[i].revents && read (fds[i].fd, &event, sizeof event) == (ssize_t) sizeof event && event.type == EV_KEY
          && event.code == KEY_POWER && event.value == 1)
        return 0;
    }
  return 1; /* no input device, or a dead one */
}

int
main (int argc, char **argv)
{
  struct targets t;
  uint64_t limit_bytes = 64u << 20, bad;
  int option;

  if (argc < 2)
    return 2;
  char **rest = argv + 1;
  int count = argc - 1;
  while ((option = getopt (count, rest, "p:l:")) != -1)
    switch (option) {
    case 'p':
      port = open (optarg, O_WRONLY | O_CLOEXEC);
      if (port == -1) {
        perror (optarg);
        return 2;
      }
      break;
    case 'l':
      limit_bytes = strtoull (optarg, NULL, 10) << 20;
      break;
    default:
      return 2;
    }
  rest += optind;
  count -= optind;

  if (strcmp (argv[1], "button") == 0)
    return wait_button ();
  if (strcmp (argv[1], "scan") == 0) {
    open_targets (&t, count, rest, O_RDONLY, limit_bytes);
    uint64_t good = scan (&t, &bad);
    uint64_t places = window (&t);
    long long first = good ? (long long) (good > places ? good - places : 0) : -1;
    printf ("RECORDS first=%lld last=%lld count=%llu bad=%llu\n", first, (long long) good - 1,
            (unsigned long long) good, (unsigned long long) bad);
    return bad != 0;
  }
  if (strcmp (argv[1], "run") == 0) {
    open_targets (&t, count, rest, O_RDWR, limit_bytes);
    return run (&t);
  }
  return 2;
}
