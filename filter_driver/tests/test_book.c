/* When a granule may become clean: each case that the head of book.h names. */
#include <string.h>

#include "book.h"
#include "check.h"
#include "scratch.h"

#define GRANULES 64
#define AT(g) ((uint64_t) (g) * GRANULE_BYTES)

static char folder[64], path[128];
static struct dirty_map map;
static struct book book;

static void
begin_clean (void)
{
  struct dirty_map_identity id = { .disk_name = "disk0", .disk_size_bytes = AT (GRANULES) };
  char why[256];

  unlink (path);
  CHECK (dirty_map_open (&map, path, &id, why, sizeof why) == 0);
  for (uint64_t g = 0; g < GRANULES; g++)
    dirty_map_clear (&map, g);
  CHECK (book_init (&book, &map) == 0);
  CHECK (book_copy_granules (&book) == 0);
  book_abandon (&book, 1);
}

static void
end (void)
{
  book_free (&book);
  dirty_map_close (&map);
}

static void
answered_write (uint64_t g)
{
  struct book_write w;

  book_begin (&book, &w, AT (g), 512, 1);
  CHECK (dirty_map_has (&map, g));
  book_end (&book, &w, true);
  CHECK (dirty_map_has (&map, g));
}

static void
flush (bool answered)
{
  struct book_flush f;

  book_flush_begin (&book, &f, 1);
  book_flush_end (&book, &f, answered);
}

static void
write_is_clean_only_after_a_later_flush (void)
{
  begin_clean ();
  answered_write (3);
  flush (true);
  CHECK (!dirty_map_has (&map, 3) && !book_has_unflushed (&book));
  end ();
}

static void
failed_flush_keeps_everything_dirty (void)
{
  begin_clean ();
  answered_write (3);
  flush (false);
  CHECK (dirty_map_has (&map, 3) && book_has_unflushed (&book));
  flush (true);
  CHECK (!dirty_map_has (&map, 3));
  end ();
}

static void
write_in_flight_during_the_flush_stays_dirty (void)
{
  struct book_flush f;
  struct book_write w;

  begin_clean ();
  answered_write (3);
  book_begin (&book, &w, AT (3), 512, 1);
  book_flush_begin (&book, &f, 1);
  book_flush_end (&book, &f, true);
  CHECK (dirty_map_has (&map, 3));
  book_end (&book, &w, true);
  flush (true);
  CHECK (!dirty_map_has (&map, 3));
  end ();
}

static void
write_answered_after_the_flush_was_sent_stays_dirty (void)
{
  struct book_flush f;

  begin_clean ();
  answered_write (3);
  book_flush_begin (&book, &f, 1);
  answered_write (3);
  answered_write (4);
  book_flush_end (&book, &f, true);
  CHECK (dirty_map_has (&map, 3) && dirty_map_has (&map, 4));
  flush (true);
  CHECK (!dirty_map_has (&map, 3) && !dirty_map_has (&map, 4));
  end ();
}

static void
second_flush_at_the_same_time_cleans_nothing (void)
{
  struct book_flush first, second;

  begin_clean ();
  answered_write (3);
  book_flush_begin (&book, &first, 1);
  answered_write (4);
  book_flush_begin (&book, &second, 1);
  book_flush_end (&book, &second, true);
  CHECK (dirty_map_has (&map, 3) && dirty_map_has (&map, 4));
  book_flush_end (&book, &first, true);
  CHECK (!dirty_map_has (&map, 3) && dirty_map_has (&map, 4));
  end ();
}

static void
lost_connection_makes_all_unflushed_to_be_copied (void)
{
  struct book_flush f;
  struct book_write w;

  begin_clean ();
  answered_write (3);
  book_flush_begin (&book, &f, 1);
  answered_write (4);
  book_begin (&book, &w, AT (5), 512, 1);
  book_abandon (&book, 2);
  book_flush_end (&book, &f, true); /* an answer that came too late says nothing */
  book_end (&book, &w, true);
  for (uint64_t g = 3; g <= 5; g++)
    CHECK (dirty_map_has (&map, g) && granule_set_has (&book.copy, g));
  CHECK (book_copy_granules (&book) == 3 && !book_has_unflushed (&book));
  end ();
}

static void
copied_granule_is_clean_after_a_flush_of_the_same_connection_only (void)
{
  begin_clean ();
  book_missed (&book, AT (7), 1);
  book_copied (&book, 7, 1, 0); /* of an older connection */
  CHECK (book_copy_granules (&book) == 1);
  book_copied (&book, 7, 1, 1);
  CHECK (book_copy_granules (&book) == 0 && dirty_map_has (&map, 7));
  book_abandon (&book, 2);
  CHECK (book_copy_granules (&book) == 1);
  end ();
}

static void
flush_does_not_clean_what_is_still_to_be_copied (void)
{
  struct book_write w;

  begin_clean ();
  book_missed (&book, AT (7), GRANULE_BYTES);
  CHECK (book_begin (&book, &w, AT (6) + 512, GRANULE_BYTES, 1)); /* reaches into it: fresh marks are needed */
  book_end (&book, &w, true);
  CHECK (!book_begin (&book, &w, AT (6), 512, 1));
  book_end (&book, &w, true);
  flush (true);
  CHECK (!dirty_map_has (&map, 6) && dirty_map_has (&map, 7));
  end ();
}

static void
what_the_file_holds_is_to_be_copied_after_a_restart (void)
{
  struct book_write w;

  begin_clean ();
  answered_write (3);
  book_begin (&book, &w, AT (63), GRANULE_BYTES, 1);
  book_free (&book); /* a crash: only the file is left */
  CHECK (book_init (&book, &map) == 0);
  CHECK (book_copy_granules (&book) == 2);
  CHECK (granule_set_has (&book.copy, 3) && granule_set_has (&book.copy, 63));
  end ();
}

int
main (void)
{
  scratch_make (folder);
  snprintf (path, sizeof path, "%s/disk0.dirty", folder);
  write_is_clean_only_after_a_later_flush ();
  failed_flush_keeps_everything_dirty ();
  write_in_flight_during_the_flush_stays_dirty ();
  write_answered_after_the_flush_was_sent_stays_dirty ();
  second_flush_at_the_same_time_cleans_nothing ();
  lost_connection_makes_all_unflushed_to_be_copied ();
  copied_granule_is_clean_after_a_flush_of_the_same_connection_only ();
  flush_does_not_clean_what_is_still_to_be_copied ();
  what_the_file_holds_is_to_be_copied_after_a_restart ();
  scratch_remove (folder);
  return 0;
}
