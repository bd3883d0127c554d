#include "range_lock.h"

#include <assert.h>
#include <errno.h>
#include <stdbool.h>

#include "clock.h"
#include "scope.h"

void
range_lock_init (struct range_lock *lock)
{
  *lock = (struct range_lock) { 0 };
  pthread_mutex_init (&lock->mu, NULL);
  pthread_cond_init (&lock->released, NULL);
}

void
range_lock_destroy (struct range_lock *lock)
{
  assert (!lock->first);
  pthread_cond_destroy (&lock->released);
  pthread_mutex_destroy (&lock->mu);
}

static bool
must_wait (const struct range_node *node)
{
  for (const struct range_node *n = node->prev; n; n = n->prev)
    if (n->offset < node->offset + node->count && node->offset < n->offset + n->count)
      return true;
  return false;
}

static void
take_out (struct range_lock *lock, struct range_node *node)
{
  *(node->prev ? &node->prev->next : &lock->first) = node->next;
  *(node->next ? &node->next->prev : &lock->last) = node->prev;
  if (lock->waiters)
    pthread_cond_broadcast (&lock->released);
}

int
range_lock_take (struct range_lock *lock, struct range_node *node, uint64_t offset, uint64_t count, int64_t deadline_us)
{
  assert (count > 0 && offset <= UINT64_MAX - count);

  LOCK_FOR_CURRENT_SCOPE (&lock->mu);
  *node = (struct range_node) { .offset = offset, .count = count, .prev = lock->last };
  *(node->prev ? &node->prev->next : &lock->first) = node;
  lock->last = node;
  while (must_wait (node)) {
    struct timespec until = deadline_timespec (deadline_us);
    lock->waiters++;
    int r = pthread_cond_clockwait (&lock->released, &lock->mu, CLOCK_MONOTONIC, &until);
    lock->waiters--;
    if (r == ETIMEDOUT && must_wait (node)) {
      take_out (lock, node);
      errno = ETIMEDOUT;
      return -1;
    }
  }
  return 0;
}

void
range_lock_release (struct range_lock *lock, struct range_node *node)
{
  LOCK_FOR_CURRENT_SCOPE (&lock->mu);
  take_out (lock, node);
}
