#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "text.h"

#define LINE_MAX_BYTES 1024
#define REPEAT_MS 30000

static char vm_name[64] = "-";

void
log_set_vm (const char *vm)
{
  text_copy (vm_name, sizeof vm_name, vm);
}

void
log_line (enum log_level level, const char *fmt, ...)
{
  static const char *const names[] = { "debug", "info", "warning", "error" };
  char line[LINE_MAX_BYTES];
  va_list args;

  if (level == LOG_DEBUG && getenv ("VMIRROR_DEBUG") == NULL)
    return;
  int head = snprintf (line, sizeof line, "%s vm=%s ", names[level], vm_name);
  size_t used = (size_t) head;
  va_start (args, fmt);
  int body = vsnprintf (line + used, sizeof line - used - 1, fmt, args);
  va_end (args);
  if (body > 0)
    used += (size_t) body;
  if (used > sizeof line - 2)
    used = sizeof line - 2;
  /* Text of a mirror or a client may be in it: it must not be able to make lines of its own. */
  for (size_t i = 0; i < used; i++)
    if ((unsigned char) line[i] < ' ' || line[i] == 0x7f)
      line[i] = '?';
  line[used++] = '\n';
  if (write (STDERR_FILENO, line, used) < 0)
    return; /* nobody to tell */
}

bool
log_gate_open (struct log_gate *gate, const char *text)
{
  int64_t now = now_us ();

  if (now < gate->next_us && strncmp (gate->last, text, sizeof gate->last - 1) == 0)
    return false;
  text_copy (gate->last, sizeof gate->last, text);
  gate->next_us = now + REPEAT_MS * 1000LL;
  return true;
}
