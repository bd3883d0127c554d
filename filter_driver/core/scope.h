/* Scope guards: what is taken here is given back when the scope is left, by whichever way. */
#pragma once

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void
scope_unlock (pthread_mutex_t **mu)
{
  if (*mu)
    pthread_mutex_unlock (*mu);
}

static inline pthread_mutex_t *
scope_lock (pthread_mutex_t *mu)
{
  int r = pthread_mutex_lock (mu);

  assert (r == 0);
  (void) r;
  return mu;
}

#define SCOPE_JOIN_(a, b) a##b
#define SCOPE_JOIN(a, b) SCOPE_JOIN_ (a, b)

#define LOCK_FOR_CURRENT_SCOPE(mu)                                                                                   \
  __attribute__ ((cleanup (scope_unlock), unused)) pthread_mutex_t *SCOPE_JOIN (scope_mu_, __LINE__)                 \
    = scope_lock (mu)

static inline void
scope_free (void *p)
{
  free (*(void **) p);
}
#define CLEANUP_FREE __attribute__ ((cleanup (scope_free)))

static inline void
scope_close (int *fd)
{
  if (*fd >= 0)
    close (*fd);
}
#define CLEANUP_CLOSE __attribute__ ((cleanup (scope_close)))
