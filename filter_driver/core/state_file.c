#include "state_file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "durable_file.h"
#include "json_fields.h"
#include "scope.h"
#include "text.h"

static void
take_reason (struct json_fields *f, const char *key, char *reason)
{
  const char *text = json_take_string_or_null (f, key, REASON_SIZE);

  text_copy (reason, REASON_SIZE, text ? text : "");
}

int
state_file_load (struct state_file *s, const char *path, char *why, size_t why_size)
{
  json_error_t error;

  *s = (struct state_file) { 0 };
  if (access (path, F_OK) == -1 && errno == ENOENT)
    return 1;
  json_t *root = json_load_file (path, JSON_REJECT_DUPLICATES, &error);
  if (!root || !json_is_object (root)) {
    text_format (why, why_size, "state file %s: %s", path, root ? "must be a JSON object" : error.text);
    json_decref (root);
    return -1;
  }
  struct json_fields f = { .object = root };
  json_take_u64 (&f, "version", 1, 1);
  if (!uuid_parse (json_take_string (&f, "protection", UUID_TEXT_SIZE), s->protection) && !f.why[0])
    text_copy (f.why, sizeof f.why, "protection: must be a UUID");
  s->generation = json_take_u64 (&f, "generation", 0, INT64_MAX);
  s->stamped_generation = json_take_u64 (&f, "stamped_generation", 0, INT64_MAX);
  s->last_sync_unix_ms = json_take_u64 (&f, "last_sync_unix_ms", 0, INT64_MAX);
  s->synced = json_take_bool (&f, "synced");
  s->detached = json_take_bool (&f, "detached");
  take_reason (&f, "paused", s->paused);
  take_reason (&f, "fenced", s->fenced);
  take_reason (&f, "failed_over", s->failed_over);
  text_copy (s->boot_id, sizeof s->boot_id, json_take_string (&f, "boot_id", sizeof s->boot_id));
  s->clean_stop = json_take_bool (&f, "clean_stop");
  int r = json_take_done (&f);
  json_decref (root);
  if (r == -1)
    text_format (why, why_size, "state file %s: %s", path, f.why);
  return r;
}

static json_t *
reason_json (const char *reason)
{
  return reason[0] ? json_string_nocheck (reason) : json_null ();
}

int
state_file_store (const struct state_file *s, const char *path)
{
  char uuid[UUID_TEXT_SIZE];

  uuid_format (s->protection, uuid);
  json_t *root = json_pack ("{s:i s:s s:I s:I s:I s:b s:b s:o s:o s:o s:s s:b}", "version", 1, "protection", uuid,
                            "generation", (json_int_t) s->generation, "stamped_generation",
                            (json_int_t) s->stamped_generation, "last_sync_unix_ms", (json_int_t) s->last_sync_unix_ms,
                            "synced", s->synced, "detached", s->detached, "paused", reason_json (s->paused), "fenced",
                            reason_json (s->fenced), "failed_over", reason_json (s->failed_over), "boot_id",
                            s->boot_id[0] ? s->boot_id : "unknown", "clean_stop", s->clean_stop);
  CLEANUP_FREE char *text = root ? json_dumps (root, JSON_INDENT (1)) : NULL;
  json_decref (root);
  if (!text) {
    errno = ENOMEM;
    return -1;
  }
  return durable_replace (path, text, strlen (text));
}

void
state_file_boot_id (char *id, size_t size)
{
  char text[64] = "";
  CLEANUP_CLOSE int fd = open ("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  ssize_t n = fd == -1 ? -1 : read (fd, text, sizeof text - 1);

  text[n > 0 ? n : 0] = '\0';
  text[strcspn (text, "\n")] = '\0';
  text_copy (id, size, text);
}
