/* Time, as the data plane uses it: monotonic microseconds, and deadlines in the same unit.
 *
 * Every wait in this program takes a deadline, not a duration: a request that passes through
 * several waits (range lock, free connection, answer of the mirror) is bounded once, from its
 * arrival, and not once per wait.
 */
#pragma once

#include <limits.h>
#include <stdint.h>
#include <time.h>

static inline int64_t
now_us (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (int64_t) ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static inline int64_t
unix_ms (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_REALTIME, &ts);
  return (int64_t) ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static inline int64_t
in_ms (int64_t ms)
{
  return now_us () + ms * 1000;
}

/* For pthread_*_clockwait with CLOCK_MONOTONIC. */
static inline struct timespec
deadline_timespec (int64_t deadline_us)
{
  return (struct timespec) { .tv_sec = (time_t) (deadline_us / 1000000),
                             .tv_nsec = (long) (deadline_us % 1000000) * 1000 };
}

/* For poll(2): rounded up, so that the last millisecond does not become a busy loop. */
static inline int
poll_timeout_ms (int64_t deadline_us)
{
  int64_t left_us = deadline_us - now_us ();

  if (left_us <= 0)
    return 0;
  if (left_us / 1000 >= INT_MAX)
    return INT_MAX;
  return (int) ((left_us + 999) / 1000);
}
