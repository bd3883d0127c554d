/* The control socket (docs/control-protocol.md): JSON lines, from clients that are not trusted to be sane.
 *
 * Bounds: 16 clients, a thread each; a line of 64 KiB; an answer that is not read within 5 s, or an event
 * within 1 s, ends the client; one command at a time per client; state-changing commands one at a time.
 */
#pragma once

#include "filter.h"

#define CONTROL_CLIENTS_MAX 16
#define CONTROL_LINE_MAX 65536

struct control;

/* Binds (a stale socket is replaced) and serves; NULL with errno. */
struct control *control_start (struct filter *f, const char *socket_path);
void control_stop (struct control *control);

/* One line without its newline; the answer with one, malloc'ed (NULL without memory).  For tests as well. */
char *control_answer (struct filter *f, const char *line, size_t length, bool *subscribe);
