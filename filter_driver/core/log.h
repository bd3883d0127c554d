/* Log lines on stderr: `level key=value ...`, the VM first, one write(2) each.
 *
 * error: an operation was given up; warning: it went on in a worse state; info: a state change;
 * debug: the rest (only with VMIRROR_DEBUG set).  Never a line per guest request.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARNING, LOG_ERROR };

void log_set_vm (const char *vm);
void log_line (enum log_level level, const char *fmt, ...) __attribute__ ((format (printf, 2, 3)));

/* A failure that repeats is logged when its text changes, else at most every 30 s. */
struct log_gate {
  int64_t next_us;
  char last[256];
};
bool log_gate_open (struct log_gate *gate, const char *text);
