#include "book.h"

#include <assert.h>

#include "scope.h"

int
book_init (struct book *book, struct dirty_map *map)
{
  *book = (struct book) { .map = map };
  if (granule_set_init (&book->copy, map->granules) == -1 || granule_set_init (&book->unflushed[0], map->granules) == -1
      || granule_set_init (&book->unflushed[1], map->granules) == -1) {
    book_free (book);
    return -1;
  }
  pthread_mutex_init (&book->mu, NULL);
  for (uint64_t g = 0; g < map->granules; g++) {
    if (g % 64 == 0 && map->words[g / 64] == 0) {
      g += 63;
      continue;
    }
    if (dirty_map_has (map, g))
      granule_set_add (&book->copy, g);
  }
  return 0;
}

void
book_free (struct book *book)
{
  granule_set_free (&book->copy);
  granule_set_free (&book->unflushed[0]);
  granule_set_free (&book->unflushed[1]);
}

bool
book_begin (struct book *book, struct book_write *write, uint64_t offset, uint64_t count, uint64_t connection)
{
  write->range = granules_of (offset, count);
  write->connection = connection;
  write->prev = NULL;

  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  dirty_map_set (book->map, write->range.first, write->range.count);
  write->next = book->inflight;
  if (write->next)
    write->next->prev = write;
  book->inflight = write;
  if (!book->copy.members)
    return false;
  uint64_t next = granule_set_next (&book->copy, write->range.first);
  return next != GRANULE_NONE && next < write->range.first + write->range.count;
}

void
book_end (struct book *book, struct book_write *write, bool answered)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  if (write->prev)
    write->prev->next = write->next;
  else
    book->inflight = write->next;
  if (write->next)
    write->next->prev = write->prev;

  bool sure = answered && write->connection == book->connection;
  granule_set_add_range (sure ? &book->unflushed[book->current] : &book->copy, write->range.first, write->range.count);
}

void
book_missed (struct book *book, uint64_t offset, uint64_t count)
{
  struct granule_range range = granules_of (offset, count);

  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  dirty_map_set (book->map, range.first, range.count);
  granule_set_add_range (&book->copy, range.first, range.count);
}

void
book_miss_all (struct book *book)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  dirty_map_set (book->map, 0, book->map->granules);
  granule_set_add_range (&book->copy, 0, book->map->granules);
}

bool
book_flush_begin (struct book *book, struct book_flush *flush, uint64_t connection)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  *flush = (struct book_flush) { .connection = connection };
  if (book->flushing || connection != book->connection)
    return false;
  assert (book->unflushed[1 - book->current].members == 0);
  book->flushing = flush->owns_set = true;
  book->current = 1 - book->current;
  return book->unflushed[1 - book->current].members != 0;
}

static bool
in_flight (const struct book *book, uint64_t granule)
{
  for (const struct book_write *w = book->inflight; w; w = w->next)
    if (granule - w->range.first < w->range.count)
      return true;
  return false;
}

void
book_flush_end (struct book *book, struct book_flush *flush, bool answered)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  if (!flush->owns_set || flush->connection != book->connection)
    return; /* book_abandon has taken the set */
  struct granule_set *taken = &book->unflushed[1 - book->current];
  const struct granule_set *newer = &book->unflushed[book->current];

  book->flushing = false;
  if (!answered) {
    granule_set_move (&book->unflushed[book->current], taken);
    return;
  }
  for (uint64_t g = granule_set_next (taken, 0); g != GRANULE_NONE; g = granule_set_next (taken, g + 1)) {
    granule_set_remove (taken, g);
    if (!granule_set_has (newer, g) && !granule_set_has (&book->copy, g) && !in_flight (book, g))
      dirty_map_clear (book->map, g);
  }
}

void
book_abandon (struct book *book, uint64_t next_connection)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  assert (next_connection > book->connection);
  granule_set_move (&book->copy, &book->unflushed[0]);
  granule_set_move (&book->copy, &book->unflushed[1]);
  for (const struct book_write *w = book->inflight; w; w = w->next)
    granule_set_add_range (&book->copy, w->range.first, w->range.count);
  book->flushing = false;
  book->connection = next_connection;
}

void
book_copied (struct book *book, uint64_t first, uint64_t count, uint64_t connection)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  if (connection != book->connection)
    return;
  for (uint64_t g = first; g < first + count; g++)
    if (granule_set_has (&book->copy, g)) {
      granule_set_remove (&book->copy, g);
      granule_set_add (&book->unflushed[book->current], g);
    }
}

uint64_t
book_next_to_copy (struct book *book, uint64_t from, uint64_t max, uint64_t *count)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  uint64_t first = granule_set_next (&book->copy, from);

  if (first != GRANULE_NONE)
    *count = granule_set_run (&book->copy, first, max);
  return first;
}

void
book_add_set (struct book *book, struct granule_set *missed)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  for (uint64_t g = granule_set_next (missed, 0), n; g != GRANULE_NONE; g = granule_set_next (missed, g + n)) {
    n = granule_set_run (missed, g, UINT64_MAX);
    dirty_map_set (book->map, g, n);
  }
  granule_set_move (&book->copy, missed);
}

uint64_t
book_copy_granules (struct book *book)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  return book->copy.members;
}

bool
book_has_unflushed (struct book *book)
{
  LOCK_FOR_CURRENT_SCOPE (&book->mu);
  return book->unflushed[0].members || book->unflushed[1].members;
}
