/* Lines of the control protocol, right and wrong, without a socket: every one gets one JSON answer, and what
 * is wrong changes nothing. */
#include <jansson.h>
#include <string.h>

#include "control.h"
#include "fake_mirror.h"
#include "filter.h"
#include "scratch.h"
#include "status.h"

static struct config config;
static struct fake_mirror mirror;
static struct fake_source source;
static struct filter *f;

/* "": it was accepted; else the error's class.  */
static const char *
answer_class (const char *line, size_t length)
{
  static char class[32];
  bool subscribe;
  char *answer = control_answer (f, line, length, &subscribe);

  CHECK (answer && strlen (answer) > 1 && strchr (answer, '\n') == answer + strlen (answer) - 1);
  json_t *root = json_loads (answer, 0, NULL);
  CHECK (json_is_object (root) && json_object_get (root, "id"));
  json_t *error = json_object_get (root, "error");
  CHECK ((error != NULL) != (json_object_get (root, "ok") != NULL));
  snprintf (class, sizeof class, "%s", error ? json_string_value (json_object_get (error, "class")) : "");
  if (error)
    CHECK (json_string_length (json_object_get (error, "message")) > 0);
  json_decref (root);
  free (answer);
  return class;
}

static const char *
class_of (const char *line)
{
  return answer_class (line, strlen (line));
}

/* Everything of a status that may not change by itself. */
static char *
facts (void)
{
  json_t *status = status_json (f);

  json_object_del (status, "uptime_ms");
  char *text = json_dumps (status, JSON_SORT_KEYS);
  json_decref (status);
  return text;
}

static void
wrong_lines_are_refused (void)
{
  static const char *const wrong[] = {
    "", " ", "{", "}", "[]", "null", "1", "\"status\"", "{}", "{\"id\": 1}", "{\"cmd\": \"status\"}",
    "{\"id\": \"1\", \"cmd\": \"status\"}", "{\"id\": -1, \"cmd\": \"status\"}", "{\"id\": 1.5, \"cmd\": \"status\"}",
    "{\"id\": 99999999999999999999, \"cmd\": \"status\"}", "{\"id\": 1, \"cmd\": null}", "{\"id\": 1, \"cmd\": \"\"}",
    "{\"id\": 1, \"cmd\": \"status\", \"more\": 1}", "{\"id\": 1, \"id\": 2, \"cmd\": \"status\"}",
    "{\"id\": 1, \"cmd\": \"STATUS\"}", "{\"id\": 1, \"cmd\": \"sta\\u0000tus\"}", "{\"id\": 1, \"cmd\": \"status\"} x",
    "{\"id\": 1, \"cmd\": \"pause\"}", "{\"id\": 1, \"cmd\": \"pause\", \"reason\": \"\"}",
    "{\"id\": 1, \"cmd\": \"fence\", \"reason\": {}}", "{\"id\": 1, \"cmd\": \"resync-begin\", \"now\": true}",
    "{\"id\": 1, \"cmd\": \"resync-copy\", \"mirror_connection\": 1, \"disks\": 1}",
    "{\"id\": 1, \"cmd\": \"resync-copy\", \"mirror_connection\": 1, \"disks\": [1, 2]}",
    "{\"id\": 1, \"cmd\": \"resync-copy\", \"mirror_connection\": 1, \"disks\": [{}, {}]}",
    "{\"id\": 1, \"cmd\": \"resync-copy\", \"mirror_connection\": -1, \"disks\": []}",
    "{\"id\": 1, \"cmd\": \"\xff\xfe\"}",
  };
  char *before = facts ();
  char *deep = malloc (60001);

  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
    if (strcmp (class_of (wrong[i]), "BadRequest") != 0) {
      fprintf (stdout, "not refused: %s\n", wrong[i]);
      exit (1);
    }
  CHECK (deep);
  memset (deep, '[', 60000);
  CHECK (strcmp (answer_class (deep, 60000), "BadRequest") == 0);
  for (size_t i = 0; i + 5 <= 60000; i += 5)
    memcpy (deep + i, "{\"a\":", 5);
  CHECK (strcmp (answer_class (deep, 60000), "BadRequest") == 0);
  CHECK (strcmp (answer_class ("{\"id\": 1, \0\"cmd\": \"status\"}", 28), "BadRequest") == 0);
  char *after = facts ();
  CHECK (strcmp (before, after) == 0);
  free (deep);
  free (before);
  free (after);
}

/* A line with a few bytes changed is refused, or is still what it was. */
static void
mutated_lines_change_nothing (void)
{
  static const char *const right[] = {
    "{\"id\": 1, \"cmd\": \"status\"}",
    "{\"id\": 1, \"cmd\": \"barrier\"}",
    "{\"id\": 7, \"cmd\": \"resync-copy\", \"mirror_connection\": 3, \"disks\": [{\"name\": \"disk0\", \"source_socket\": "
    "\"/x\", \"source_export\": \"0\", \"bitmap\": null, \"covers_client_connection\": 0}, {\"name\": \"disk1\", "
    "\"source_socket\": \"/x\", \"source_export\": \"1\", \"bitmap\": \"b\", \"covers_client_connection\": 0}]}",
  };
  struct dice dice = { 5 };
  char *before = facts ();

  for (unsigned i = 0; i < 20000; i++) {
    char line[512];
    size_t length = strlen (right[i % 3]);
    memcpy (line, right[i % 3], length);
    for (uint64_t n = roll_below (&dice, 4); n > 0; n--)
      line[roll_below (&dice, length)] = (char) roll (&dice);
    length -= roll_below (&dice, 8) ? 0 : roll_below (&dice, length);
    answer_class (line, length);
  }
  char *after = facts ();
  CHECK (strcmp (before, after) == 0);
  free (before);
  free (after);
}

int
main (void)
{
  char folder[64];

  CHECK (freopen ("/dev/null", "w", stderr));
  scratch_make (folder);
  config.disk_count = FAKE_DISKS;
  config.stall_ms = 1000;
  snprintf (config.vm, sizeof config.vm, "web");
  snprintf (config.state_dir, sizeof config.state_dir, "%s", folder);
  for (unsigned d = 0; d < FAKE_DISKS; d++) {
    snprintf (config.disks[d].name, sizeof config.disks[d].name, "disk%u", d);
    config.disks[d].size_bytes = FAKE_BYTES;
  }
  fake_mirror_init (&mirror, config.protection, 1);
  fake_source_init (&source);
  f = filter_new (&config, &mirror.dev, &source.dev);
  CHECK (f);
  CHECK (strcmp (class_of ("{\"id\": 1, \"cmd\": \"status\"}"), "") == 0);
  CHECK (strcmp (class_of ("{\"id\": 1, \"cmd\": \"barrier\"}"), "WrongState") == 0);
  wrong_lines_are_refused ();
  mutated_lines_change_nothing ();
  CHECK (strcmp (class_of ("{\"id\": 1, \"cmd\": \"fence\", \"reason\": \"failover\"}"), "") == 0);
  CHECK (strcmp (class_of ("{\"id\": 1, \"cmd\": \"resync-begin\"}"), "WrongState") == 0);
  CHECK (filter_stop (f));
  filter_free (f);
  scratch_remove (folder);
  return 0;
}
