/* The book of one disk: why a granule is dirty, and when it may become clean.
 *
 * A granule's bit in the dirty map (the mmap'ed file) is set while any of these holds:
 *   - it has to be copied by a resync                      -> member of `copy`
 *   - a write to it is on its way to the mirror            -> in the list `inflight`
 *   - a write to it was answered, no later flush was yet   -> member of `unflushed[0]` or `[1]`
 * Only the union is on disk: after a crash of the filter all of it has to be copied, and is.
 *
 * Steady state.  book_begin sets the bit before anything is sent.  book_end moves the write from
 * `inflight` to the *current* unflushed set.  A flush begins by making the other (empty) set
 * current, so that the set it has taken holds only writes that were answered before the flush was
 * sent; when the mirror has answered the flush, the granules of that set become clean, except
 * those that are also in the current set, in flight, or to be copied.  So a newer write to a
 * granule keeps it dirty, whatever the order of events.  A second flush that starts while one is
 * under way takes no set: it cleans nothing, which is always allowed.
 *
 * Mirror connections are numbered.  book_abandon (the connection failed) moves everything
 * unflushed or in flight into `copy` and takes the next number; a write or flush that was begun with an older
 * number ends as a failure, whatever the mirror said: it may have been lost with the connection.
 *
 * Locking: `mu` protects everything and is a leaf: nothing else is taken, and no I/O done, under it.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "dirty_map.h"
#include "granule.h"
#include "granule_set.h"

struct book_write {
  struct granule_range range;
  uint64_t connection;
  struct book_write *prev, *next;
};

struct book_flush {
  uint64_t connection;
  bool owns_set;
};

struct book {
  pthread_mutex_t mu;
  struct dirty_map *map;
  struct granule_set copy;
  struct granule_set unflushed[2];
  unsigned current;
  bool flushing;
  uint64_t connection;
  struct book_write *inflight;
};

/* Everything that the map holds has to be copied. */
int book_init (struct book *book, struct dirty_map *map);
void book_free (struct book *book);

/* Returns whether a granule of the range is still to be copied (then its sectors must be marked fresh). */
bool book_begin (struct book *book, struct book_write *write, uint64_t offset, uint64_t count, uint64_t connection);
void book_end (struct book *book, struct book_write *write, bool answered);
/* A write that was not sent. */
void book_missed (struct book *book, uint64_t offset, uint64_t count);
void book_miss_all (struct book *book);

/* Returns whether there is anything that the flush could make clean. */
bool book_flush_begin (struct book *book, struct book_flush *flush, uint64_t connection);
void book_flush_end (struct book *book, struct book_flush *flush, bool answered);

void book_abandon (struct book *book, uint64_t next_connection);

/* The copier: granules whose source contents are on the mirror, not flushed yet. */
void book_copied (struct book *book, uint64_t first, uint64_t count, uint64_t connection);
uint64_t book_next_to_copy (struct book *book, uint64_t from, uint64_t max, uint64_t *count);
void book_add_set (struct book *book, struct granule_set *missed);

uint64_t book_copy_granules (struct book *book);
bool book_has_unflushed (struct book *book);
