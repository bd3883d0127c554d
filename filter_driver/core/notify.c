/* "Well" means: the locks that every request takes can be taken, and no guest request is older than the
 * stall time and a margin.  A filter that is not well stays silent and is killed: its guest goes on without
 * it, and its dirty map is on disk. */
#include "notify.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "clock.h"
#include "scope.h"
#include "tee.h"

#define OVERDUE_MARGIN_US 2000000
#define INTERVAL_WITHOUT_WATCHDOG_US 1000000

struct notify {
  struct filter *f;
  pthread_t thread;
  pthread_mutex_t mu;
  pthread_cond_t changed;
  bool stopping; /* [mu] */
  struct sockaddr_un address;
  socklen_t address_size;
  int fd;
  int64_t interval_us;
};

static void
send_text (struct notify *n, const char *text)
{
  ssize_t sent = sendto (n->fd, text, strlen (text), MSG_NOSIGNAL | MSG_DONTWAIT, (const struct sockaddr *) &n->address,
                         n->address_size);
  (void) sent; /* who does not listen will miss it and kill us: that is its meaning */
}

static bool
is_well (struct filter *f)
{
  {
    LOCK_FOR_CURRENT_SCOPE (&f->mu);
  }
  for (unsigned i = 0; i < f->disk_count; i++)
    book_has_unflushed (&f->disks[i].book);
  return tee_oldest_request_us (f) < filter_stall_us (f) + OVERDUE_MARGIN_US;
}

static void *
notify_main (void *opaque)
{
  struct notify *n = opaque;

  send_text (n, "READY=1");
  for (;;) {
    if (is_well (n->f))
      send_text (n, "WATCHDOG=1");
    struct timespec until = deadline_timespec (now_us () + n->interval_us);
    LOCK_FOR_CURRENT_SCOPE (&n->mu);
    while (!n->stopping && pthread_cond_clockwait (&n->changed, &n->mu, CLOCK_MONOTONIC, &until) != ETIMEDOUT)
      continue;
    if (n->stopping)
      return NULL;
  }
}

struct notify *
notify_start (struct filter *f)
{
  const char *path = getenv ("NOTIFY_SOCKET"), *usec = getenv ("WATCHDOG_USEC");
  struct notify *n;

  errno = 0;
  if (!path || (path[0] != '/' && path[0] != '@'))
    return NULL;
  size_t length = strlen (path);
  if (length >= sizeof n->address.sun_path) {
    errno = ENAMETOOLONG;
    return NULL;
  }
  n = calloc (1, sizeof *n);
  if (!n)
    return NULL;
  n->f = f;
  n->address.sun_family = AF_UNIX;
  memcpy (n->address.sun_path, path, length);
  if (path[0] == '@')
    n->address.sun_path[0] = '\0';
  n->address_size = (socklen_t) (offsetof (struct sockaddr_un, sun_path) + length);
  long long watchdog_us = usec ? strtoll (usec, NULL, 10) : 0;
  n->interval_us = watchdog_us > 0 ? watchdog_us / 4 : INTERVAL_WITHOUT_WATCHDOG_US;
  n->fd = socket (AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  pthread_mutex_init (&n->mu, NULL);
  pthread_cond_init (&n->changed, NULL);
  int r = n->fd == -1 ? errno : pthread_create (&n->thread, NULL, notify_main, n);
  if (r != 0) {
    if (n->fd != -1)
      close (n->fd);
    free (n);
    errno = r;
    return NULL;
  }
  return n;
}

void
notify_stop (struct notify *n)
{
  if (!n)
    return;
  {
    LOCK_FOR_CURRENT_SCOPE (&n->mu);
    n->stopping = true;
    pthread_cond_broadcast (&n->changed);
  }
  pthread_join (n->thread, NULL);
  send_text (n, "STOPPING=1");
  close (n->fd);
  pthread_cond_destroy (&n->changed);
  pthread_mutex_destroy (&n->mu);
  free (n);
}
