/* The config file: what is right is taken, anything else is refused with the name of the field. */
#include <string.h>

#include "check.h"
#include "config.h"
#include "scratch.h"

#define GOOD_MIRROR "\"mirror\": {\"type\": \"nbd\", \"socket\": \"/m\", \"superblock_export\": \"superblock\"}"
#define GOOD_DISKS "\"disks\": [{\"name\": \"disk0\", \"size_bytes\": 1048576, \"mirror_export\": \"disk0\"}]"
#define GOOD_HEAD                                                                                                    \
  "\"version\": 1, \"protection\": \"12345678-1234-1234-1234-123456789abc\", \"vm\": \"web\", \"state_dir\": \"/s\","   \
  "\"control_socket\": \"/c\", \"stall_ms\": 8000"

static char folder[64], path[128];

static int
load (const char *text, struct config *c, char *why, size_t size)
{
  FILE *f = fopen (path, "w");

  CHECK (f && fputs (text, f) >= 0 && fclose (f) == 0);
  return config_load (c, path, why, size);
}

int
main (void)
{
  static const struct {
    const char *field, *text;
  } wrong[] = {
    { "line 1", "{" },
    { "object", "[]" },
    { "version", "{\"version\": 2}" },
    { "protection", "{\"version\": 1, \"protection\": \"x\"}" },
    { "extra", "{" GOOD_HEAD "," GOOD_MIRROR "," GOOD_DISKS ", \"extra\": 1}" },
    { "mirror", "{" GOOD_HEAD "," GOOD_DISKS "}" },
    { "mirror.type", "{" GOOD_HEAD ", \"mirror\": {\"type\": \"tape\"}," GOOD_DISKS "}" },
    { "mirror.superblock", "{" GOOD_HEAD ", \"mirror\": {\"type\": \"file\"}," GOOD_DISKS "}" },
    { "disks", "{" GOOD_HEAD "," GOOD_MIRROR ", \"disks\": []}" },
    { "disks[0].name", "{" GOOD_HEAD "," GOOD_MIRROR
                       ", \"disks\": [{\"name\": \"disk1\", \"size_bytes\": 512, \"mirror_export\": \"x\"}]}" },
    { "disks[0].size_bytes", "{" GOOD_HEAD "," GOOD_MIRROR
                             ", \"disks\": [{\"name\": \"disk0\", \"size_bytes\": 1000, \"mirror_export\": \"x\"}]}" },
    { "disks[0].size_bytes", "{" GOOD_HEAD "," GOOD_MIRROR
                             ", \"disks\": [{\"name\": \"disk0\", \"size_bytes\": -512, \"mirror_export\": \"x\"}]}" },
    { "disks[0].mirror_path", "{" GOOD_HEAD ", \"mirror\": {\"type\": \"file\", \"superblock\": \"/x\"}," GOOD_DISKS "}" },
    { "duplicate", "{\"vm\": \"a\", \"vm\": \"b\"}" },
  };
  struct config c;
  char why[512], deep[5000];

  scratch_make (folder);
  snprintf (path, sizeof path, "%s/filter.json", folder);
  CHECK (load ("{" GOOD_HEAD "," GOOD_MIRROR "," GOOD_DISKS "}", &c, why, sizeof why) == 0);
  CHECK (c.disk_count == 1 && c.stall_ms == 8000 && c.mirror_type == MIRROR_NBD && c.disks[0].size_bytes == 1048576);
  CHECK (c.protection[0] == 0x12 && c.protection[15] == 0xbc);
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    CHECK (load (wrong[i].text, &c, why, sizeof why) == -1);
    if (!strstr (why, wrong[i].field)) {
      fprintf (stderr, "wanted %s: %s\n", wrong[i].field, why);
      return 1;
    }
  }
  memset (deep, '[', sizeof deep - 1);
  deep[sizeof deep - 1] = '\0';
  CHECK (load (deep, &c, why, sizeof why) == -1);
  scratch_remove (folder);
  return 0;
}
