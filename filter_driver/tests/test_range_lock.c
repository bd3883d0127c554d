/* Overlapping ranges exclude each other, in order of arrival; others do not wait; waits are bounded. */
#include <errno.h>
#include <stdbool.h>

#include "check.h"
#include "clock.h"
#include "range_lock.h"

#define BYTES 64
#define THREADS 8
#define ROUNDS 4000

static struct range_lock lock;
static int holders[BYTES]; /* atomic: how many hold this byte */

static void *
hammer (void *seed)
{
  struct dice dice = { (uint64_t) (uintptr_t) seed };

  for (unsigned i = 0; i < ROUNDS; i++) {
    uint64_t offset = roll_below (&dice, BYTES), count = 1 + roll_below (&dice, BYTES - offset);
    struct range_node node;
    if (range_lock_take (&lock, &node, offset, count, in_ms (20000)) == -1)
      abort ();
    for (uint64_t b = offset; b < offset + count; b++)
      CHECK (__atomic_fetch_add (&holders[b], 1, __ATOMIC_SEQ_CST) == 0);
    for (uint64_t b = offset; b < offset + count; b++)
      CHECK (__atomic_fetch_sub (&holders[b], 1, __ATOMIC_SEQ_CST) == 1);
    range_lock_release (&lock, &node);
  }
  return NULL;
}

static void
overlapping_holders_exclude_each_other (void)
{
  pthread_t threads[THREADS];

  for (uintptr_t i = 0; i < THREADS; i++)
    CHECK (pthread_create (&threads[i], NULL, hammer, (void *) (i + 1)) == 0);
  for (unsigned i = 0; i < THREADS; i++)
    pthread_join (threads[i], NULL);
}

static void
disjoint_ranges_do_not_wait_and_an_overlap_times_out (void)
{
  struct range_node a, b, c;

  CHECK (range_lock_take (&lock, &a, 0, 512, 0) == 0);
  CHECK (range_lock_take (&lock, &b, 512, 512, 0) == 0);
  CHECK (range_lock_take (&lock, &c, 511, 2, in_ms (20)) == -1 && errno == ETIMEDOUT);
  range_lock_release (&lock, &a);
  range_lock_release (&lock, &b);
  CHECK (range_lock_take (&lock, &c, 511, 2, 0) == 0);
  range_lock_release (&lock, &c);
}

struct arrival {
  struct range_node node;
  uint64_t offset, count;
  int order; /* in which the lock was got */
};
static int next_order;

static void *
arrive (void *opaque)
{
  struct arrival *a = opaque;

  CHECK (range_lock_take (&lock, &a->node, a->offset, a->count, in_ms (20000)) == 0);
  a->order = __atomic_fetch_add (&next_order, 1, __ATOMIC_SEQ_CST);
  range_lock_release (&lock, &a->node);
  return NULL;
}

static void
wait_for_waiters (unsigned count)
{
  for (;;) {
    pthread_mutex_lock (&lock.mu);
    unsigned waiters = lock.waiters;
    pthread_mutex_unlock (&lock.mu);
    if (waiters == count)
      return;
    sched_yield ();
  }
}

static void
nobody_overtakes (void)
{
  struct range_node held;
  struct arrival arrivals[] = { { .offset = 0, .count = 10 }, { .offset = 5, .count = 10 }, { .offset = 12, .count = 1 } };
  pthread_t threads[3];

  CHECK (range_lock_take (&lock, &held, 0, 1, 0) == 0);
  for (unsigned i = 0; i < 3; i++) {
    CHECK (pthread_create (&threads[i], NULL, arrive, &arrivals[i]) == 0);
    wait_for_waiters (i + 1);
  }
  range_lock_release (&lock, &held);
  for (unsigned i = 0; i < 3; i++)
    pthread_join (threads[i], NULL);
  CHECK (arrivals[0].order < arrivals[1].order && arrivals[1].order < arrivals[2].order);
}

int
main (void)
{
  range_lock_init (&lock);
  overlapping_holders_exclude_each_other ();
  disjoint_ranges_do_not_wait_and_an_overlap_times_out ();
  nobody_overtakes ();
  range_lock_destroy (&lock);
  return 0;
}
