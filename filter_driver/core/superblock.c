#include "superblock.h"

#include <inttypes.h>
#include <string.h>

#include "crc32.h"
#include "le_bytes.h"
#include "text.h"

static uint32_t
slot_crc (const uint8_t *slot)
{
  static const uint8_t zero[4];
  uint32_t crc = crc32_update (0, slot, VM_SUPERBLOCK_OFF_CRC);

  crc = crc32_update (crc, zero, sizeof zero);
  return crc32_update (crc, slot + VM_SUPERBLOCK_OFF_CRC + 4, VM_SUPERBLOCK_SIZE - VM_SUPERBLOCK_OFF_CRC - 4);
}

static void
get_text (char *to, const uint8_t *slot, size_t offset, size_t size)
{
  memcpy (to, slot + offset, size);
  to[size - 1] = '\0';
}

/* NULL, or what is wrong. */
static const char *
decode_slot (const uint8_t *slot, struct superblock *b)
{
  if (memcmp (slot + VM_SUPERBLOCK_OFF_MAGIC, VM_SUPERBLOCK_MAGIC, VM_SUPERBLOCK_LEN_MAGIC) != 0)
    return "wrong magic";
  if (le32_at (slot, VM_SUPERBLOCK_OFF_CRC) != slot_crc (slot))
    return "wrong checksum";
  if (le32_at (slot, VM_SUPERBLOCK_OFF_VERSION) != VM_SUPERBLOCK_VERSION)
    return "unknown version";
  *b = (struct superblock) { 0 };
  memcpy (b->uuid, slot + VM_SUPERBLOCK_OFF_UUID, sizeof b->uuid);
  b->sequence = le64_at (slot, VM_SUPERBLOCK_OFF_SEQUENCE);
  b->generation = le64_at (slot, VM_SUPERBLOCK_OFF_GENERATION);
  uint32_t flags = le32_at (slot, VM_SUPERBLOCK_OFF_FLAGS);
  b->consistent = flags & VM_SUPERBLOCK_FLAG_CONSISTENT;
  b->promoted = flags & VM_SUPERBLOCK_FLAG_PROMOTED;
  b->forced = flags & VM_SUPERBLOCK_FLAG_FORCED;
  b->disk_count = le32_at (slot, VM_SUPERBLOCK_OFF_DISK_COUNT);
  if (b->disk_count < 1 || b->disk_count > DISKS_MAX)
    return "disk count out of range";
  for (unsigned i = 0; i < DISKS_MAX; i++) {
    b->disk_size_bytes[i] = le64_at (slot, VM_SUPERBLOCK_OFF_DISK_SIZE_BYTES + i * 8);
    if ((b->disk_size_bytes[i] == 0) == (i < b->disk_count))
      return "disk sizes do not fit the disk count";
  }
  b->last_sync_unix_ms = le64_at (slot, VM_SUPERBLOCK_OFF_LAST_SYNC_UNIX_MS);
  b->updated_unix_ms = le64_at (slot, VM_SUPERBLOCK_OFF_UPDATED_UNIX_MS);
  get_text (b->writer, slot, VM_SUPERBLOCK_OFF_WRITER, sizeof b->writer);
  get_text (b->vm_name, slot, VM_SUPERBLOCK_OFF_VM_NAME, sizeof b->vm_name);
  get_text (b->reason, slot, VM_SUPERBLOCK_OFF_REASON, sizeof b->reason);
  return NULL;
}

int
superblock_decode (const uint8_t file[SUPERBLOCK_FILE_BYTES], struct superblock *block, char *why, size_t why_size)
{
  struct superblock slots[2];
  const char *wrong0 = decode_slot (file + VM_SUPERBLOCK_SLOT_0_OFFSET, &slots[0]);
  const char *wrong1 = decode_slot (file + VM_SUPERBLOCK_SLOT_1_OFFSET, &slots[1]);

  if (wrong0 && wrong1) {
    text_format (why, why_size, "the superblock is not valid (slot 0: %s, slot 1: %s)", wrong0, wrong1);
    return -1;
  }
  if (wrong0)
    *block = slots[1];
  else if (wrong1)
    *block = slots[0];
  else
    *block = slots[slots[1].sequence > slots[0].sequence];
  return 0;
}

uint64_t
superblock_encode (const struct superblock *b, uint8_t slot[SUPERBLOCK_SLOT_BYTES])
{
  memset (slot, 0, SUPERBLOCK_SLOT_BYTES);
  memcpy (slot + VM_SUPERBLOCK_OFF_MAGIC, VM_SUPERBLOCK_MAGIC, VM_SUPERBLOCK_LEN_MAGIC);
  le32_put (slot, VM_SUPERBLOCK_OFF_VERSION, VM_SUPERBLOCK_VERSION);
  le64_put (slot, VM_SUPERBLOCK_OFF_SEQUENCE, b->sequence);
  memcpy (slot + VM_SUPERBLOCK_OFF_UUID, b->uuid, sizeof b->uuid);
  le64_put (slot, VM_SUPERBLOCK_OFF_GENERATION, b->generation);
  le32_put (slot, VM_SUPERBLOCK_OFF_FLAGS,
            (b->consistent ? VM_SUPERBLOCK_FLAG_CONSISTENT : 0u) | (b->promoted ? VM_SUPERBLOCK_FLAG_PROMOTED : 0u)
              | (b->forced ? VM_SUPERBLOCK_FLAG_FORCED : 0u));
  le32_put (slot, VM_SUPERBLOCK_OFF_DISK_COUNT, b->disk_count);
  for (unsigned i = 0; i < DISKS_MAX; i++)
    le64_put (slot, VM_SUPERBLOCK_OFF_DISK_SIZE_BYTES + i * 8, b->disk_size_bytes[i]);
  le64_put (slot, VM_SUPERBLOCK_OFF_LAST_SYNC_UNIX_MS, b->last_sync_unix_ms);
  le64_put (slot, VM_SUPERBLOCK_OFF_UPDATED_UNIX_MS, b->updated_unix_ms);
  text_copy ((char *) slot + VM_SUPERBLOCK_OFF_WRITER, VM_SUPERBLOCK_LEN_WRITER, b->writer);
  text_copy ((char *) slot + VM_SUPERBLOCK_OFF_VM_NAME, VM_SUPERBLOCK_LEN_VM_NAME, b->vm_name);
  text_copy ((char *) slot + VM_SUPERBLOCK_OFF_REASON, VM_SUPERBLOCK_LEN_REASON, b->reason);
  le32_put (slot, VM_SUPERBLOCK_OFF_CRC, slot_crc (slot));
  return b->sequence % 2 ? VM_SUPERBLOCK_SLOT_1_OFFSET : VM_SUPERBLOCK_SLOT_0_OFFSET;
}
