#include "file_mirror.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "file_io.h"
#include "scope.h"
#include "text.h"

#define SLOTS_MAX 64u
#define ABANDONED_MAX (SLOTS_MAX + 4)
#define PAGE_BYTES 4096u

struct open_files {
  int direct[DISKS_MAX];   /* O_DIRECT, or buffered where the file system has none */
  int buffered[DISKS_MAX];
  uint32_t alignment[DISKS_MAX]; /* of direct requests; 1: none needed */
  int superblock;
};

struct file_mirror {
  struct mirror_dev dev; /* first */
  const struct config *config;
  pthread_mutex_t mu;       /* protects what follows; a leaf */
  pthread_cond_t job_ended; /* an opener or closer is through */
  unsigned jobs;            /* openers and closers under way, whoever waits for them or not */
  struct file_io *abandoned[ABANDONED_MAX]; /* busy slots of closed sessions */
  unsigned abandoned_count;
  bool no_ring; /* atomic: io_uring was refused once */
};

struct mirror_session {
  struct file_mirror *mirror;
  struct open_files files;
  int wake_fd;
  pthread_rwlock_t pages[DISKS_MAX]; /* shared: direct requests; exclusive: one through the page cache */
  pthread_mutex_t mu;                /* protects the slots */
  pthread_cond_t returned;
  struct file_io *idle[SLOTS_MAX]; /* a stack */
  unsigned idle_count, slot_count;
  struct file_io *lost[SLOTS_MAX];
  unsigned lost_count;
  bool abandoned;
  pthread_mutex_t seeker_mu;
  struct file_io *seeker; /* answers FILE_EXTENT; NULL once it is lost */
};

/* -- opening and closing, in a thread of their own: open(2) and close(2) can hang, too -- */

struct open_job {
  struct file_mirror *mirror;
  bool probe;
  bool done, given_up; /* [mirror.mu] */
  struct open_files files;
  char fault[MIRROR_FAULT_SIZE]; /* "": well */
};

static void
close_files (struct open_files *files, unsigned disk_count)
{
  for (unsigned i = 0; i < disk_count; i++) {
    if (files->direct[i] != -1)
      close (files->direct[i]);
    if (files->buffered[i] != -1)
      close (files->buffered[i]);
  }
  if (files->superblock != -1)
    close (files->superblock);
}

static uint32_t
direct_alignment (int fd)
{
#ifdef STATX_DIOALIGN
  struct statx stx;

  if (statx (fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 && stx.stx_mask & STATX_DIOALIGN
      && stx.stx_dio_offset_align && stx.stx_dio_offset_align <= PAGE_BYTES
      && stx.stx_dio_mem_align <= FILE_IO_ALIGNMENT)
    return stx.stx_dio_offset_align;
#endif
  return PAGE_BYTES;
}

/* QEMU's image locks (block/file-posix.c): byte 100+p is locked shared by who uses permission p, byte 200+p
   by who does not let others use it.  Permission 1 is writing, 3 is resizing. */
static int
lock_like_qemu (int fd)
{
  static const struct {
    short byte;
    bool take, check;
  } locks[] = { { 101, true, true }, { 201, true, true }, { 203, true, false }, { 103, false, true } };

  for (size_t i = 0; i < sizeof locks / sizeof *locks; i++) {
    struct flock lock = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = locks[i].byte, .l_len = 1 };
    if (locks[i].take && fcntl (fd, F_OFD_SETLK, &lock) == -1) {
      if (errno == EAGAIN || errno == EACCES)
        return -1;
      return 0; /* a file system without locks protects nobody: QEMU goes on as well */
    }
    lock = (struct flock) { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = locks[i].byte, .l_len = 1 };
    if (locks[i].check && fcntl (fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK)
      return -1;
  }
  return 0;
}

static int
open_image (struct open_job *job, unsigned i)
{
  const struct disk_config *disk = &job->mirror->config->disks[i];
  struct open_files *files = &job->files;
  const char *name = disk->name;
  struct stat st;

  files->buffered[i] = open (disk->mirror_path, O_RDWR | O_CLOEXEC);
  if (files->buffered[i] == -1 || fstat (files->buffered[i], &st) == -1) {
    text_format (job->fault, sizeof job->fault, "the mirror's image of %s cannot be opened: %s", name, strerror (errno));
    return -1;
  }
  if (!S_ISREG (st.st_mode)) {
    text_format (job->fault, sizeof job->fault, "the mirror's image of %s is not a regular file", name);
    return -1;
  }
  if ((uint64_t) st.st_size != disk->size_bytes) {
    text_format (job->fault, sizeof job->fault, "the mirror's image of %s has %jd bytes, the disk has %" PRIu64, name,
                 (intmax_t) st.st_size, disk->size_bytes);
    return -1;
  }
  if (job->probe)
    return 0;
  if (lock_like_qemu (files->buffered[i]) == -1) {
    text_format (job->fault, sizeof job->fault, "the mirror's image of %s is open for writing by another program", name);
    return -1;
  }
  files->direct[i] = open (disk->mirror_path, O_RDWR | O_CLOEXEC | O_DIRECT);
  if (files->direct[i] != -1)
    files->alignment[i] = direct_alignment (files->direct[i]);
  else if (errno == EINVAL) { /* tmpfs and friends: everything through the page cache, which is coherent */
    files->direct[i] = fcntl (files->buffered[i], F_DUPFD_CLOEXEC, 0);
    files->alignment[i] = 1;
  }
  if (files->direct[i] == -1) {
    text_format (job->fault, sizeof job->fault, "the mirror's image of %s cannot be opened: %s", name, strerror (errno));
    return -1;
  }
  return 0;
}

static void
job_ended_locked (struct file_mirror *m)
{
  m->jobs--;
  pthread_cond_broadcast (&m->job_ended);
}

static void *
open_main (void *opaque)
{
  struct open_job *job = opaque;
  struct file_mirror *m = job->mirror;
  struct open_files *files = &job->files;

  for (unsigned i = 0; i < DISKS_MAX; i++)
    files->direct[i] = files->buffered[i] = -1;
  files->superblock = open (m->config->superblock_path, O_RDWR | O_CLOEXEC);
  if (files->superblock == -1)
    text_format (job->fault, sizeof job->fault, "the mirror's superblock cannot be opened: %s", strerror (errno));
  for (unsigned i = 0; !job->fault[0] && i < m->config->disk_count; i++)
    if (open_image (job, i) == -1)
      break;
  if (job->fault[0]) {
    close_files (files, m->config->disk_count);
    for (unsigned i = 0; i < DISKS_MAX; i++)
      files->direct[i] = files->buffered[i] = -1;
    files->superblock = -1;
  }
  bool given_up;
  {
    LOCK_FOR_CURRENT_SCOPE (&m->mu);
    given_up = job->given_up;
    job->done = true;
    if (!given_up)
      job_ended_locked (m);
  }
  if (given_up) { /* nobody waits any more */
    close_files (files, m->config->disk_count);
    free (job);
    LOCK_FOR_CURRENT_SCOPE (&m->mu);
    job_ended_locked (m);
  }
  return NULL;
}

struct close_job {
  struct file_mirror *mirror;
  struct open_files files;
};

static void *
close_main (void *opaque)
{
  struct close_job *job = opaque;

  close_files (&job->files, job->mirror->config->disk_count);
  LOCK_FOR_CURRENT_SCOPE (&job->mirror->mu);
  job_ended_locked (job->mirror);
  free (job);
  return NULL;
}

static int
start_detached (struct file_mirror *m, void *(*start) (void *), void *opaque)
{
  pthread_attr_t attr;
  pthread_t thread;

  {
    LOCK_FOR_CURRENT_SCOPE (&m->mu);
    m->jobs++;
  }
  pthread_attr_init (&attr);
  pthread_attr_setdetachstate (&attr, PTHREAD_CREATE_DETACHED);
  int r = pthread_create (&thread, &attr, start, opaque);
  pthread_attr_destroy (&attr);
  if (r != 0) {
    LOCK_FOR_CURRENT_SCOPE (&m->mu);
    job_ended_locked (m);
    errno = r;
    return -1;
  }
  return 0;
}

/* Frees the abandoned slots whose request has ended; how many are left? */
static unsigned
reap_abandoned_locked (struct file_mirror *m)
{
  unsigned left = 0;

  for (unsigned i = 0; i < m->abandoned_count; i++) {
    if (file_io_busy (m->abandoned[i]))
      m->abandoned[left++] = m->abandoned[i];
    else
      file_io_free (m->abandoned[i]);
  }
  m->abandoned_count = left;
  return left;
}

/* Everything of the last session must have ended before a new one may write. */
static int
wait_abandoned (struct file_mirror *m, int64_t deadline_us, char *fault)
{
  for (;;) {
    LOCK_FOR_CURRENT_SCOPE (&m->mu);
    unsigned left = reap_abandoned_locked (m);
    if (left == 0 && m->jobs == 0)
      return 0;
    if (now_us () >= deadline_us) {
      text_format (fault, MIRROR_FAULT_SIZE, "the mirror's file system has not ended %u earlier requests yet", left + m->jobs);
      return -1;
    }
    /* Rings have no condition to wait for: looked at again soon. */
    int64_t soon_us = in_ms (20);
    struct timespec until = deadline_timespec (soon_us < deadline_us ? soon_us : deadline_us);
    pthread_cond_clockwait (&m->job_ended, &m->mu, CLOCK_MONOTONIC, &until);
  }
}

static struct open_job *
open_files_bounded (struct file_mirror *m, bool probe, int64_t deadline_us, char *fault)
{
  struct open_job *job = calloc (1, sizeof *job);
  struct timespec until = deadline_timespec (deadline_us);

  if (!job) {
    text_copy (fault, MIRROR_FAULT_SIZE, "no memory");
    return NULL;
  }
  job->mirror = m;
  job->probe = probe;
  if (start_detached (m, open_main, job) == -1) {
    text_format (fault, MIRROR_FAULT_SIZE, "no thread to open the mirror: %s", strerror (errno));
    free (job);
    return NULL;
  }
  {
    LOCK_FOR_CURRENT_SCOPE (&m->mu);
    while (!job->done)
      if (pthread_cond_clockwait (&m->job_ended, &m->mu, CLOCK_MONOTONIC, &until) == ETIMEDOUT && !job->done) {
        job->given_up = true;
        text_copy (fault, MIRROR_FAULT_SIZE, "the mirror's file system does not answer");
        return NULL;
      }
  }
  if (!job->fault[0])
    return job;
  text_copy (fault, MIRROR_FAULT_SIZE, job->fault);
  free (job);
  return NULL;
}

static struct mirror_session *
file_open (struct mirror_dev *dev, bool probe, int64_t deadline_us, char *fault)
{
  struct file_mirror *m = (struct file_mirror *) dev;

  if (wait_abandoned (m, deadline_us, fault) == -1)
    return NULL;
  struct open_job *job = open_files_bounded (m, probe, deadline_us, fault);
  if (!job)
    return NULL;
  struct mirror_session *s = calloc (1, sizeof *s);
  int wake_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  struct file_io *seeker = wake_fd == -1 ? NULL : file_io_new (FILE_IO_THREAD, wake_fd);
  if (!s || !seeker) {
    text_copy (fault, MIRROR_FAULT_SIZE, "no memory or no file descriptors");
    close_files (&job->files, m->config->disk_count);
    if (wake_fd != -1)
      close (wake_fd);
    free (s);
    free (job);
    return NULL;
  }
  s->mirror = m;
  s->files = job->files;
  s->wake_fd = wake_fd;
  s->seeker = seeker;
  free (job);
  pthread_mutex_init (&s->mu, NULL);
  pthread_mutex_init (&s->seeker_mu, NULL);
  pthread_cond_init (&s->returned, NULL);
  for (unsigned i = 0; i < m->config->disk_count; i++)
    pthread_rwlock_init (&s->pages[i], NULL);
  return s;
}

/* -- slots -- */

static struct file_io *
new_slot (struct mirror_session *s)
{
  struct file_mirror *m = s->mirror;

  if (!__atomic_load_n (&m->no_ring, __ATOMIC_RELAXED)) {
    struct file_io *io = file_io_new (FILE_IO_RING, s->wake_fd);
    if (io)
      return io;
    __atomic_store_n (&m->no_ring, true, __ATOMIC_RELAXED);
  }
  return file_io_new (FILE_IO_THREAD, s->wake_fd);
}

static struct file_io *
take_slot (struct mirror_session *s, int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);
  int r = 0;

  LOCK_FOR_CURRENT_SCOPE (&s->mu);
  while (!s->abandoned && s->idle_count == 0 && s->slot_count == SLOTS_MAX && r == 0)
    r = pthread_cond_clockwait (&s->returned, &s->mu, CLOCK_MONOTONIC, &until);
  if (s->abandoned) {
    errno = ESHUTDOWN;
    return NULL;
  }
  if (s->idle_count > 0)
    return s->idle[--s->idle_count];
  if (s->slot_count == SLOTS_MAX) {
    errno = ETIMEDOUT;
    return NULL;
  }
  struct file_io *io = new_slot (s);
  if (io)
    s->slot_count++;
  return io;
}

static void
give_slot (struct mirror_session *s, struct file_io *io)
{
  LOCK_FOR_CURRENT_SCOPE (&s->mu);
  if (file_io_busy (io))
    s->lost[s->lost_count++] = io;
  else {
    s->idle[s->idle_count++] = io;
    pthread_cond_signal (&s->returned);
  }
}

/* -- requests -- */

/* Writes what is in the slot's buffer; short writes are gone on with. */
static int
write_buffer (struct file_io *io, int fd, uint32_t count, uint64_t offset, uint32_t alignment, int64_t deadline_us)
{
  uint8_t *buffer = file_io_buffer (io, count);

  while (count > 0) {
    struct file_request request = { .op = FILE_WRITE, .fd = fd, .count = count, .offset = offset };
    int64_t n = file_io_run (io, &request, deadline_us, NULL);
    if (n == -1)
      return -1;
    if (n == 0 || n % alignment) {
      errno = EIO;
      return -1;
    }
    count -= (uint32_t) n;
    offset += (uint64_t) n;
    memmove (buffer, buffer + n, count);
  }
  return 0;
}

static int
datasync (struct file_io *io, int fd, int64_t deadline_us)
{
  struct file_request request = { .op = FILE_DATASYNC, .fd = fd };

  return file_io_run (io, &request, deadline_us, NULL) == -1 ? -1 : 0;
}

/* `buf` NULL: zeroes. */
static int
write_pieces (struct file_io *io, int fd, const uint8_t *buf, uint64_t count, uint64_t offset, uint32_t alignment,
              int64_t deadline_us)
{
  for (uint32_t piece; count > 0; count -= piece, offset += piece, buf = buf ? buf + piece : NULL) {
    piece = count < FILE_IO_BUFFER_MAX ? (uint32_t) count : FILE_IO_BUFFER_MAX;
    uint8_t *buffer = file_io_buffer (io, piece);
    if (!buffer) {
      errno = ENOMEM;
      return -1;
    }
    if (buf)
      memcpy (buffer, buf, piece);
    else
      memset (buffer, 0, piece);
    if (write_buffer (io, fd, piece, offset, alignment, deadline_us) == -1)
      return -1;
  }
  return 0;
}

static int
punch (struct file_io *io, int fd, uint64_t count, uint64_t offset, int64_t deadline_us)
{
  static const int modes[] = { FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE };

  for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
    struct file_request request
      = { .op = FILE_FALLOCATE, .fd = fd, .mode = modes[i], .offset = offset, .length = count };
    if (file_io_run (io, &request, deadline_us, NULL) == 0)
      return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)
      return -1;
  }
  errno = EOPNOTSUPP;
  return -1;
}

/* One write (or, `buf` NULL, zeroing) by the way that its alignment allows. */
static int
change (struct mirror_session *s, unsigned disk, const uint8_t *buf, uint64_t count, uint64_t offset, bool fua,
        int64_t deadline_us)
{
  struct timespec until = deadline_timespec (deadline_us);
  uint32_t alignment = s->files.alignment[disk];
  bool direct = (offset | count) % (buf ? alignment : PAGE_BYTES) == 0 || alignment == 1;
  int fd = direct ? s->files.direct[disk] : s->files.buffered[disk];

  errno = direct ? pthread_rwlock_clockrdlock (&s->pages[disk], CLOCK_MONOTONIC, &until)
                 : pthread_rwlock_clockwrlock (&s->pages[disk], CLOCK_MONOTONIC, &until);
  if (errno)
    return -1;
  struct file_io *io = take_slot (s, deadline_us);
  int r = io ? 0 : -1;
  if (io) {
    if (!buf && punch (io, fd, count, offset, deadline_us) == 0)
      r = 0;
    else if (!buf && errno != EOPNOTSUPP)
      r = -1;
    else
      r = write_pieces (io, fd, buf, count, offset, direct ? alignment : 1, deadline_us);
    if (r == 0 && (fua || !direct))
      r = datasync (io, fd, deadline_us);
  }
  int err = errno;
  if (io)
    give_slot (s, io);
  pthread_rwlock_unlock (&s->pages[disk]);
  errno = err;
  return r;
}

static int
file_pwrite (struct mirror_session *s, unsigned disk, const void *buf, uint32_t count, uint64_t offset, bool fua,
             int64_t deadline_us)
{
  return change (s, disk, buf, count, offset, fua, deadline_us);
}

static int
file_zero (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, bool fua, int64_t deadline_us)
{
  return change (s, disk, NULL, count, offset, fua, deadline_us);
}

static int
file_flush (struct mirror_session *s, unsigned disk, int64_t deadline_us)
{
  struct file_io *io = take_slot (s, deadline_us);

  if (!io)
    return -1;
  int r = datasync (io, s->files.direct[disk], deadline_us);
  int err = errno;
  give_slot (s, io);
  errno = err;
  return r;
}

static int
file_zero_extent (struct mirror_session *s, unsigned disk, uint64_t count, uint64_t offset, int64_t deadline_us, bool *zero,
                  uint64_t *length)
{
  struct file_request request
    = { .op = FILE_EXTENT, .fd = s->files.buffered[disk], .offset = offset, .length = count };
  struct timespec until = deadline_timespec (deadline_us);
  uint64_t found = 0;
  int64_t r = -1;

  errno = pthread_mutex_clocklock (&s->seeker_mu, CLOCK_MONOTONIC, &until);
  if (errno)
    return -1;
  if (s->seeker) {
    r = file_io_run (s->seeker, &request, deadline_us, &found);
    if (r == -1 && (errno == ETIMEDOUT || errno == ESHUTDOWN)) {
      int err = errno;
      LOCK_FOR_CURRENT_SCOPE (&s->mu);
      s->lost[s->lost_count++] = s->seeker;
      s->seeker = NULL;
      errno = err;
    }
  } else
    errno = ESHUTDOWN;
  int err = errno;
  pthread_mutex_unlock (&s->seeker_mu);
  if (r == -1 && err == EINVAL) { /* no SEEK_DATA here: nothing is known to be zero */
    *zero = false;
    *length = count;
    return 0;
  }
  if (r == -1) {
    errno = err;
    return -1;
  }
  *zero = r == 1;
  *length = found < count ? found : count;
  if (*length == 0) {
    errno = EIO;
    return -1;
  }
  return 0;
}

static int
file_super_read (struct mirror_session *s, uint8_t *file, int64_t deadline_us)
{
  struct file_request request = { .op = FILE_READ, .fd = s->files.superblock, .count = SUPERBLOCK_FILE_BYTES };
  struct file_io *io = take_slot (s, deadline_us);

  if (!io)
    return -1;
  uint8_t *buffer = file_io_buffer (io, SUPERBLOCK_FILE_BYTES);
  int64_t n = -1;
  if (buffer) {
    n = file_io_run (io, &request, deadline_us, NULL);
    if (n == SUPERBLOCK_FILE_BYTES)
      memcpy (file, buffer, SUPERBLOCK_FILE_BYTES);
    else if (n >= 0)
      errno = EIO; /* too short to be a superblock */
  } else
    errno = ENOMEM;
  int err = errno;
  give_slot (s, io);
  errno = err;
  return n == SUPERBLOCK_FILE_BYTES ? 0 : -1;
}

static int
file_super_write (struct mirror_session *s, const uint8_t *slot, uint32_t count, uint64_t offset, int64_t deadline_us)
{
  struct file_io *io = take_slot (s, deadline_us);

  if (!io)
    return -1;
  int r = write_pieces (io, s->files.superblock, slot, count, offset, 1, deadline_us);
  if (r == 0)
    r = datasync (io, s->files.superblock, deadline_us);
  int err = errno;
  give_slot (s, io);
  errno = err;
  return r;
}

static void
file_abandon (struct mirror_session *s)
{
  const uint64_t one = 1;
  ssize_t n = write (s->wake_fd, &one, sizeof one);

  (void) n;
  LOCK_FOR_CURRENT_SCOPE (&s->mu);
  s->abandoned = true;
  pthread_cond_broadcast (&s->returned);
}

/* Busy slots outlive the session (a ring's poll holds the eventfd's file, not its number). */
static void
keep_lost_slots (struct mirror_session *s)
{
  struct file_mirror *m = s->mirror;

  LOCK_FOR_CURRENT_SCOPE (&m->mu);
  for (unsigned i = 0; i < s->lost_count; i++) {
    assert (m->abandoned_count < ABANDONED_MAX);
    m->abandoned[m->abandoned_count++] = s->lost[i];
  }
}

static void
file_close (struct mirror_session *s)
{
  struct file_mirror *m = s->mirror;
  struct close_job *job = calloc (1, sizeof *job);

  keep_lost_slots (s);
  for (unsigned i = 0; i < s->idle_count; i++)
    file_io_free (s->idle[i]);
  if (s->seeker)
    file_io_free (s->seeker);
  close (s->wake_fd);
  if (job) {
    *job = (struct close_job) { m, s->files };
    if (start_detached (m, close_main, job) == -1)
      free (job), job = NULL;
  }
  if (!job)
    close_files (&s->files, m->config->disk_count);
  for (unsigned i = 0; i < m->config->disk_count; i++)
    pthread_rwlock_destroy (&s->pages[i]);
  pthread_mutex_destroy (&s->mu);
  pthread_mutex_destroy (&s->seeker_mu);
  pthread_cond_destroy (&s->returned);
  free (s);
}

static const struct mirror_dev_ops file_mirror_ops = {
  .open = file_open,
  .pwrite = file_pwrite,
  .zero = file_zero,
  .flush = file_flush,
  .zero_extent = file_zero_extent,
  .super_read = file_super_read,
  .super_write = file_super_write,
  .abandon = file_abandon,
  .close = file_close,
};

struct mirror_dev *
file_mirror_new (const struct config *config)
{
  struct file_mirror *m = calloc (1, sizeof *m);

  if (!m)
    return NULL;
  m->dev.ops = &file_mirror_ops;
  m->config = config;
  pthread_mutex_init (&m->mu, NULL);
  pthread_cond_init (&m->job_ended, NULL);
  m->no_ring = getenv ("VMIRROR_NO_IO_URING") != NULL; /* for hosts that must do without, and for the tests */
  return &m->dev;
}

void
file_mirror_free (struct mirror_dev *dev)
{
  struct file_mirror *m = (struct file_mirror *) dev;
  bool busy;

  {
    LOCK_FOR_CURRENT_SCOPE (&m->mu);
    busy = reap_abandoned_locked (m) > 0 || m->jobs > 0;
  }
  /* What hangs in the kernel keeps its memory: the process is about to end anyway. */
  if (!busy)
    free (m);
}
