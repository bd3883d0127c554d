/* Two slots: the newest valid one counts, a torn or foreign one does not. */
#include <string.h>

#include "check.h"
#include "crc32.h"
#include "le_bytes.h"
#include "superblock.h"

static uint8_t file[SUPERBLOCK_FILE_BYTES];

static struct superblock
sample (uint64_t sequence, uint64_t generation)
{
  struct superblock b = { .uuid = { 0xab, 1 }, .sequence = sequence, .generation = generation, .consistent = true,
                          .disk_count = 2, .disk_size_bytes = { 1 << 20, 512 }, .last_sync_unix_ms = 5,
                          .updated_unix_ms = 6 };
  strcpy (b.writer, "filter");
  strcpy (b.vm_name, "web");
  return b;
}

static void
put (const struct superblock *b)
{
  uint8_t slot[SUPERBLOCK_SLOT_BYTES];
  uint64_t offset = superblock_encode (b, slot);

  memcpy (file + offset, slot, sizeof slot);
}

static void
refix_crc (uint8_t *slot)
{
  le32_put (slot, VM_SUPERBLOCK_OFF_CRC, 0);
  le32_put (slot, VM_SUPERBLOCK_OFF_CRC, crc32_update (0, slot, SUPERBLOCK_SLOT_BYTES));
}

int
main (void)
{
  struct superblock b, old = sample (4, 1), new = sample (5, 2);
  char why[200];

  CHECK (superblock_decode (file, &b, why, sizeof why) == -1 && strstr (why, "magic"));

  put (&old);
  CHECK (superblock_decode (file, &b, why, sizeof why) == 0 && b.generation == 1 && b.sequence == 4);
  put (&new);
  CHECK (superblock_decode (file, &b, why, sizeof why) == 0 && b.generation == 2 && b.consistent && !b.promoted);
  CHECK (b.disk_count == 2 && b.disk_size_bytes[1] == 512 && strcmp (b.writer, "filter") == 0);

  /* A torn rewrite leaves the other slot. */
  file[VM_SUPERBLOCK_SLOT_1_OFFSET + 300] ^= 1;
  CHECK (superblock_decode (file, &b, why, sizeof why) == 0 && b.generation == 1);
  file[VM_SUPERBLOCK_SLOT_0_OFFSET + 300] ^= 1;
  CHECK (superblock_decode (file, &b, why, sizeof why) == -1 && strstr (why, "checksum"));

  /* A right checksum does not make nonsense sense. */
  uint8_t *slot = file + VM_SUPERBLOCK_SLOT_0_OFFSET;
  static const uint32_t counts[] = { 0, 1, 3, 9, UINT32_MAX };
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
    put (&old);
    le32_put (slot, VM_SUPERBLOCK_OFF_DISK_COUNT, counts[i]);
    refix_crc (slot);
    CHECK (superblock_decode (file, &b, why, sizeof why) == -1);
  }
  put (&old);
  le32_put (slot, VM_SUPERBLOCK_OFF_VERSION, 2);
  refix_crc (slot);
  CHECK (superblock_decode (file, &b, why, sizeof why) == -1 && strstr (why, "version"));

  /* A text that fills its field is cut at the end of a character. */
  memset (new.vm_name, 0, sizeof new.vm_name);
  for (size_t i = 0; i + 2 < sizeof new.vm_name; i += 2)
    memcpy (new.vm_name + i, "\xc3\xa4", 2);
  put (&new);
  CHECK (superblock_decode (file, &b, why, sizeof why) == 0 && strlen (b.vm_name) == 62);
  return 0;
}
