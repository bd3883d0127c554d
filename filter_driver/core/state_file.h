/* `filter.state`: what the filter must know after a crash that the dirty maps do not say.
 *
 * `generation` is raised and made durable here *before* it is stamped into the mirror's superblock,
 * so that a crash in between leaves ours the higher one, never the lower.  `stamped_generation`
 * follows after the stamp: a mirror that shows less than it is an older copy of the mirror, which the
 * dirty maps do not describe.
 *
 * `boot_id` and `clean_stop` tell an unclean end of the host, after which the mmap'ed dirty maps may
 * lack bits: then everything is dirty.  (Write-intent zones will narrow that down; DESIGN 3.)
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define REASON_SIZE 256

struct state_file {
  uint8_t protection[16];
  uint64_t generation;
  uint64_t stamped_generation;
  uint64_t last_sync_unix_ms;
  bool synced; /* has been MIRRORING */
  bool detached;
  char paused[REASON_SIZE];      /* "": no; else why */
  char fenced[REASON_SIZE];      /* likewise */
  char failed_over[REASON_SIZE]; /* likewise */
  char boot_id[64];
  bool clean_stop;
};

/* 1 when there is none yet; -1 with a text that names file and field. */
int state_file_load (struct state_file *state, const char *path, char *why, size_t why_size);
int state_file_store (const struct state_file *state, const char *path);
/* The id of this boot of the host, "" when it cannot be known. */
void state_file_boot_id (char *id, size_t size);
