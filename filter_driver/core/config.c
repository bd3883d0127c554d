#include "config.h"

#include <string.h>

#include "granule.h"
#include "json_fields.h"
#include "text.h"

#define DISK_BYTES_MAX (UINT64_C (1) << 50) /* 1 PiB: 2 GiB of dirty map */

static int
load_disk (struct config *c, unsigned i, json_t *object, char *why, size_t why_size)
{
  struct disk_config *d = &c->disks[i];
  char where[32], expected[16];

  text_format (where, sizeof where, "disks[%u].", i);
  struct json_fields f = { .object = object, .where = where };
  text_copy (d->name, sizeof d->name, json_take_string (&f, "name", sizeof d->name));
  d->size_bytes = json_take_u64 (&f, "size_bytes", SECTOR_BYTES, DISK_BYTES_MAX);
  if (c->mirror_type == MIRROR_NBD)
    text_copy (d->mirror_export, sizeof d->mirror_export,
               json_take_string (&f, "mirror_export", sizeof d->mirror_export));
  else
    text_copy (d->mirror_path, sizeof d->mirror_path, json_take_string (&f, "mirror_path", sizeof d->mirror_path));
  json_take_done (&f);
  text_format (expected, sizeof expected, "disk%u", i);
  if (!f.why[0] && strcmp (d->name, expected) != 0)
    text_format (f.why, sizeof f.why, "%sname: must be %s", where, expected);
  if (!f.why[0] && d->size_bytes % SECTOR_BYTES)
    text_format (f.why, sizeof f.why, "%ssize_bytes: must be a multiple of 512", where);
  if (f.why[0])
    text_copy (why, why_size, f.why);
  return f.why[0] ? -1 : 0;
}

static int
load_mirror (struct config *c, json_t *object, char *why, size_t why_size)
{
  struct json_fields f = { .object = object, .where = "mirror." };
  const char *type = json_take_string (&f, "type", 16);

  if (strcmp (type, "nbd") == 0) {
    c->mirror_type = MIRROR_NBD;
    text_copy (c->mirror_socket, sizeof c->mirror_socket, json_take_string (&f, "socket", sizeof c->mirror_socket));
    text_copy (c->superblock_export, sizeof c->superblock_export,
               json_take_string (&f, "superblock_export", sizeof c->superblock_export));
  } else if (strcmp (type, "file") == 0) {
    c->mirror_type = MIRROR_FILE;
    text_copy (c->superblock_path, sizeof c->superblock_path,
               json_take_string (&f, "superblock", sizeof c->superblock_path));
  } else if (!f.why[0])
    text_copy (f.why, sizeof f.why, "mirror.type: must be nbd or file");
  if (json_take_done (&f) == -1) {
    text_copy (why, why_size, f.why);
    return -1;
  }
  return 0;
}

static int
load_object (struct config *c, json_t *root, char *why, size_t why_size)
{
  struct json_fields f = { .object = root };

  *c = (struct config) { 0 };
  json_take_u64 (&f, "version", 1, 1);
  if (!uuid_parse (json_take_string (&f, "protection", UUID_TEXT_SIZE), c->protection) && !f.why[0])
    text_copy (f.why, sizeof f.why, "protection: must be a UUID");
  text_copy (c->vm, sizeof c->vm, json_take_string (&f, "vm", PATH_MAX));
  text_copy (c->state_dir, sizeof c->state_dir, json_take_string (&f, "state_dir", sizeof c->state_dir));
  text_copy (c->control_socket, sizeof c->control_socket,
             json_take_string (&f, "control_socket", sizeof c->control_socket));
  c->stall_ms = (uint32_t) json_take_u64 (&f, "stall_ms", STALL_MS_MIN, STALL_MS_MAX);
  json_t *mirror = json_take_object (&f, "mirror");
  json_t *disks = json_take_array (&f, "disks", 1, DISKS_MAX);
  if (json_take_done (&f) == -1) {
    text_copy (why, why_size, f.why);
    return -1;
  }
  if (load_mirror (c, mirror, why, why_size) == -1)
    return -1;
  c->disk_count = (unsigned) json_array_size (disks);
  for (unsigned i = 0; i < c->disk_count; i++)
    if (load_disk (c, i, json_array_get (disks, i), why, why_size) == -1)
      return -1;
  return 0;
}

int
config_load (struct config *c, const char *path, char *why, size_t why_size)
{
  char text[240];
  json_error_t error;
  json_t *root = json_load_file (path, JSON_REJECT_DUPLICATES, &error);

  if (!root) {
    text_format (why, why_size, "config %s, line %d: %s", path, error.line, error.text);
    return -1;
  }
  if (!json_is_object (root)) {
    text_format (why, why_size, "config %s: must be a JSON object", path);
    json_decref (root);
    return -1;
  }
  int r = load_object (c, root, text, sizeof text);
  json_decref (root);
  if (r == -1)
    text_format (why, why_size, "config %s: %s", path, text);
  return r;
}
