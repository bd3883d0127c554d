/* The mirror's superblock, as mirror/domain/superblock.py: two slots in a file of 4096 bytes, the
 * newest valid one counts, and a rewrite goes to the slot of its sequence number's parity, so that
 * a torn write leaves the other slot. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vm_layout.h"

#define SUPERBLOCK_FILE_BYTES VM_SUPERBLOCK_FILE_SIZE
#define SUPERBLOCK_SLOT_BYTES VM_SUPERBLOCK_SIZE
#define DISKS_MAX VM_SUPERBLOCK_LEN_DISK_SIZE_BYTES

struct superblock {
  uint8_t uuid[16];
  uint64_t sequence;
  uint64_t generation;
  bool consistent;
  bool promoted;
  bool forced;
  unsigned disk_count;
  uint64_t disk_size_bytes[DISKS_MAX];
  uint64_t last_sync_unix_ms;
  uint64_t updated_unix_ms;
  char writer[VM_SUPERBLOCK_LEN_WRITER];
  char vm_name[VM_SUPERBLOCK_LEN_VM_NAME];
  char reason[VM_SUPERBLOCK_LEN_REASON];
};

/* The newest valid slot; -1 with a text that says what is wrong with each. */
int superblock_decode (const uint8_t file[SUPERBLOCK_FILE_BYTES], struct superblock *block, char *why, size_t why_size);
/* Returns where in the file the slot goes. */
uint64_t superblock_encode (const struct superblock *block, uint8_t slot[SUPERBLOCK_SLOT_BYTES]);
