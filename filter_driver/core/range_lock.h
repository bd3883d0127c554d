/* Byte-range locks of one disk: overlapping requests reach the mirror one after the other, in the
 * order in which they arrived here; requests that do not overlap never wait for each other.
 *
 * The holder's node lives on its stack.  Nodes stay in one list in order of arrival; one has the
 * lock when no earlier node overlaps it.  So there is no overtaking and no deadlock (a thread takes
 * one range at a time).  The list is as long as requests are in flight: a few dozen at most, bounded
 * by the threads of the front end.
 */
#pragma once

#include <pthread.h>
#include <stdint.h>

struct range_node {
  uint64_t offset;
  uint64_t count;
  struct range_node *prev, *next;
};

struct range_lock {
  pthread_mutex_t mu; /* protects the list and `waiters`; a leaf */
  pthread_cond_t released;
  struct range_node *first, *last;
  unsigned waiters;
};

void range_lock_init (struct range_lock *lock);
void range_lock_destroy (struct range_lock *lock);
/* -1 with ETIMEDOUT after `deadline_us`; the range is then not held. */
int range_lock_take (struct range_lock *lock, struct range_node *node, uint64_t offset, uint64_t count,
                     int64_t deadline_us);
void range_lock_release (struct range_lock *lock, struct range_node *node);
