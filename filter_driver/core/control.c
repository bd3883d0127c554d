#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "clock.h"
#include "commands.h"
#include "json_fields.h"
#include "scope.h"
#include "status.h"
#include "text.h"

#define ANSWER_TIMEOUT_MS 5000
#define EVENT_TIMEOUT_MS 1000
#define PROGRESS_INTERVAL_MS 1000
#define HALF_LINE_TIMEOUT_MS 10000
#define DISCARD_TIMEOUT_MS 1000
#define DISCARD_READS_MAX 64
#define SLOT_GRACE_MS 200
#define OPERATION_TIMEOUT_MS 60000

/* -- one line -- */

static char *
line_of (json_t *message)
{
  char *text = message ? json_dumps (message, JSON_COMPACT) : NULL;
  char *line = NULL;

  if (text) {
    size_t length = strlen (text);
    line = realloc (text, length + 2);
    if (line)
      memcpy (line + length, "\n", 2);
    else
      free (text);
  }
  json_decref (message);
  return line;
}

static json_t *
error_message (json_t *id, enum refusal_class class, const char *text)
{
  static const char *const names[] = { "BadRequest", "WrongState", "Stale", "Mirror", "Internal" };
  json_t *message = json_string (text);

  if (!message)
    message = json_string ("(the reason is not valid UTF-8)");
  return json_pack ("{s:O s:{s:s s:o}}", "id", id, "error", "class", names[class], "message", message);
}

static int
take_source (struct filter *f, json_t *object, struct copy_source *sources, bool *seen, struct refusal *refusal)
{
  struct json_fields fields = { .object = object, .where = "disks[]." };

  if (!json_is_object (object))
    return refuse (refusal, REFUSED_BAD_REQUEST, "disks: each entry must be an object");
  const char *name = json_take_string (&fields, "name", sizeof f->config->disks[0].name);
  const char *socket_path = json_take_string (&fields, "source_socket", SOCKET_PATH_SIZE);
  const char *export_name = json_take_string (&fields, "source_export", EXPORT_NAME_SIZE);
  const char *bitmap = json_take_string_or_null (&fields, "bitmap", EXPORT_NAME_SIZE - 32);
  uint64_t covers = json_take_u64 (&fields, "covers_client_connection", 0, INT64_MAX);
  if (json_take_done (&fields) == -1)
    return refuse (refusal, REFUSED_BAD_REQUEST, "%s", fields.why);
  for (unsigned i = 0; i < f->disk_count; i++) {
    if (strcmp (name, f->config->disks[i].name) != 0)
      continue;
    if (seen[i])
      return refuse (refusal, REFUSED_BAD_REQUEST, "disks: %s is named twice", name);
    seen[i] = true;
    text_copy (sources[i].socket, sizeof sources[i].socket, socket_path);
    text_copy (sources[i].export_name, sizeof sources[i].export_name, export_name);
    text_copy (sources[i].bitmap, sizeof sources[i].bitmap, bitmap ? bitmap : "");
    sources[i].covers = covers;
    return 0;
  }
  return refuse (refusal, REFUSED_BAD_REQUEST, "disks: there is no %s", name);
}

enum command {
  COMMAND_STATUS,
  COMMAND_SUBSCRIBE,
  COMMAND_BEGIN,
  COMMAND_COPY,
  COMMAND_BARRIER,
  COMMAND_PAUSE,
  COMMAND_RESUME,
  COMMAND_DETACH,
  COMMAND_FENCE,
  COMMAND_UNKNOWN,
};

static enum command
command_named (const char *name)
{
  static const char *const names[]
    = { "status", "subscribe", "resync-begin", "resync-copy", "barrier", "pause", "resume", "detach", "fence" };

  for (unsigned i = 0; i < COMMAND_UNKNOWN; i++)
    if (strcmp (name, names[i]) == 0)
      return (enum command) i;
  return COMMAND_UNKNOWN;
}

/* What the arguments hold; checked before anything is done. */
struct arguments {
  const char *reason;
  uint64_t connection;
  struct copy_source sources[DISKS_MAX];
};

static int
take_arguments (struct filter *f, enum command command, struct json_fields *fields, struct arguments *a,
                struct refusal *refusal)
{
  bool seen[DISKS_MAX] = { false };
  json_t *disks = NULL;

  if (command == COMMAND_PAUSE || command == COMMAND_RESUME || command == COMMAND_FENCE)
    a->reason = json_take_string (fields, "reason", REASON_SIZE - 16);
  if (command == COMMAND_COPY) {
    a->connection = json_take_u64 (fields, "mirror_connection", 0, INT64_MAX);
    disks = json_take_array (fields, "disks", f->disk_count, f->disk_count);
  }
  if (json_take_done (fields) == -1)
    return refuse (refusal, REFUSED_BAD_REQUEST, "%s", fields->why);
  for (size_t i = 0; i < json_array_size (disks); i++)
    if (take_source (f, json_array_get (disks, i), a->sources, seen, refusal) == -1)
      return -1;
  return 0;
}

/* The value of "ok", or NULL with the refusal. */
static json_t *
operate (struct filter *f, enum command command, const struct arguments *a, struct refusal *refusal)
{
  uint64_t number;
  int r;

  switch (command) {
  case COMMAND_BEGIN:
    r = resync_begin (f, &number, refusal);
    return r == 0 ? json_pack ("{s:I}", "mirror_connection", (json_int_t) number) : NULL;
  case COMMAND_COPY:
    r = resync_copy (f, a->connection, a->sources, &number, refusal);
    return r == 0 ? json_pack ("{s:I}", "merged_bytes", (json_int_t) number) : NULL;
  case COMMAND_BARRIER:
    r = command_barrier (f, refusal);
    break;
  case COMMAND_PAUSE:
    r = command_pause (f, a->reason, refusal);
    break;
  case COMMAND_RESUME:
    r = command_resume (f, refusal);
    break;
  case COMMAND_DETACH:
    r = command_detach (f, refusal);
    break;
  default:
    r = command_fence_durably (f, refusal);
    break;
  }
  return r == 0 ? status_json (f) : NULL;
}

static json_t *
run_command (struct filter *f, enum command command, struct json_fields *fields, struct refusal *refusal)
{
  struct arguments arguments = { 0 };

  if (take_arguments (f, command, fields, &arguments, refusal) == -1)
    return NULL;
  if (command == COMMAND_STATUS || command == COMMAND_SUBSCRIBE)
    return status_json (f);
  if (command == COMMAND_FENCE && command_fence_now (f, arguments.reason, refusal) == -1)
    return NULL;
  if (filter_begin_operation (f, in_ms (OPERATION_TIMEOUT_MS)) == -1) {
    refuse (refusal, REFUSED_INTERNAL, "another command does not come to an end");
    return NULL;
  }
  json_t *ok = operate (f, command, &arguments, refusal);
  filter_end_operation (f);
  return ok;
}

char *
control_answer (struct filter *f, const char *line, size_t length, bool *subscribe)
{
  struct refusal refusal = { REFUSED_INTERNAL, "no memory" };
  json_error_t error;
  char text[REASON_SIZE];

  *subscribe = false;
  json_t *root = json_loadb (line, length, JSON_REJECT_DUPLICATES, &error);
  json_t *null = json_null ();
  if (!json_is_object (root)) {
    text_format (text, sizeof text, "not a JSON object: %s", root ? "another kind of value" : error.text);
    json_decref (root);
    return line_of (error_message (null, REFUSED_BAD_REQUEST, text));
  }
  struct json_fields fields = { .object = root };
  json_t *id = json_object_get (root, "id");
  json_t *result = NULL;
  enum command command = COMMAND_UNKNOWN;
  if (!json_is_integer (id)) {
    refuse (&refusal, REFUSED_BAD_REQUEST, "id: must be a whole number");
    id = null;
  } else {
    json_take_u64 (&fields, "id", 0, INT64_MAX);
    const char *name = json_take_string (&fields, "cmd", 32);
    command = command_named (name);
    if (fields.why[0])
      refuse (&refusal, REFUSED_BAD_REQUEST, "%s", fields.why);
    else if (command == COMMAND_UNKNOWN)
      refuse (&refusal, REFUSED_BAD_REQUEST, "cmd: there is no command %s", name);
    else
      result = run_command (f, command, &fields, &refusal);
  }
  *subscribe = result && command == COMMAND_SUBSCRIBE;
  char *answer = line_of (result ? json_pack ("{s:O s:o}", "id", id, "ok", result)
                                 : error_message (id, refusal.class, refusal.message));
  json_decref (root);
  return answer;
}

/* -- clients -- */

struct control_client {
  struct control *control;
  pthread_t thread;
  bool used;  /* [control.mu] the slot has a thread that must be joined */
  bool ended; /* [control.mu] the thread is past everything but returning */
  int fd;
  int event_fd; /* -1: no subscriber */
  size_t buffered;
  char buffer[CONTROL_LINE_MAX + 1];
};

struct control {
  struct filter *f;
  char path[SOCKET_PATH_SIZE];
  int listen_fd;
  int stop_fd; /* eventfd, readable for ever once it stops */
  pthread_t thread;
  pthread_mutex_t mu;
  pthread_cond_t client_ended;
  struct control_client clients[CONTROL_CLIENTS_MAX];
};

/* -1 when the client does not take it in time. */
static int
send_line (struct control_client *c, const char *line, int64_t timeout_ms)
{
  int64_t deadline_us = in_ms (timeout_ms);
  size_t length = strlen (line);

  while (length > 0) {
    ssize_t n = send (c->fd, line, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      line += n;
      length -= (size_t) n;
      continue;
    }
    if (n == -1 && errno != EAGAIN && errno != EINTR)
      return -1;
    struct pollfd fds[] = { { .fd = c->fd, .events = POLLOUT }, { .fd = c->control->stop_fd, .events = POLLIN } };
    if (poll (fds, 2, poll_timeout_ms (deadline_us)) == 0 || fds[1].revents)
      return -1;
  }
  return 0;
}

static int
send_event (struct control_client *c)
{
  char *line = line_of (json_pack ("{s:s s:o}", "event", "status", "status", status_json (c->control->f)));
  int r = line ? send_line (c, line, EVENT_TIMEOUT_MS) : -1;

  free (line);
  return r;
}

static int
watch (struct control_client *c)
{
  struct filter *f = c->control->f;

  if (c->event_fd != -1)
    return 0;
  c->event_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (c->event_fd == -1)
    return -1;
  LOCK_FOR_CURRENT_SCOPE (&f->watchers_mu);
  for (unsigned i = 0; i < WATCHERS_MAX; i++)
    if (f->watchers[i] == -1) {
      f->watchers[i] = c->event_fd;
      return 0;
    }
  return -1;
}

static void
unwatch (struct control_client *c)
{
  struct filter *f = c->control->f;

  if (c->event_fd == -1)
    return;
  {
    LOCK_FOR_CURRENT_SCOPE (&f->watchers_mu);
    for (unsigned i = 0; i < WATCHERS_MAX; i++)
      if (f->watchers[i] == c->event_fd)
        f->watchers[i] = -1;
  }
  close (c->event_fd);
  c->event_fd = -1;
}

static int
answer_line (struct control_client *c, const char *line, size_t length)
{
  bool subscribe;

  /* Watched before the first status is made: no change can fall between the two. */
  char *answer = control_answer (c->control->f, line, length, &subscribe);
  int r = answer ? 0 : -1;
  if (r == 0 && subscribe) {
    if ((r = watch (c)) == 0) {
      free (answer);
      answer = control_answer (c->control->f, line, length, &subscribe);
      r = answer ? 0 : -1;
    }
  }
  if (r == 0)
    r = send_line (c, answer, ANSWER_TIMEOUT_MS);
  free (answer);
  return r;
}

/* A close with unread input makes the kernel send a reset, which can overtake the answer: what the client
   still sends is read away first, within bounds. */
static void
discard_input (struct control_client *c)
{
  int64_t deadline_us = in_ms (DISCARD_TIMEOUT_MS);

  shutdown (c->fd, SHUT_WR);
  for (unsigned i = 0; i < DISCARD_READS_MAX; i++) {
    struct pollfd fds[] = { { .fd = c->fd, .events = POLLIN }, { .fd = c->control->stop_fd, .events = POLLIN } };
    if (poll (fds, 2, poll_timeout_ms (deadline_us)) <= 0 || fds[1].revents
        || recv (c->fd, c->buffer, sizeof c->buffer, MSG_DONTWAIT) <= 0)
      return;
  }
}

/* Whole lines are answered one after the other; -1 ends the client. */
static int
take_input (struct control_client *c)
{
  ssize_t n = recv (c->fd, c->buffer + c->buffered, CONTROL_LINE_MAX - c->buffered, MSG_DONTWAIT);

  if (n == 0 || (n == -1 && errno != EAGAIN && errno != EINTR))
    return -1;
  if (n == -1)
    return 0;
  c->buffered += (size_t) n;
  char *line = c->buffer, *end;
  while ((end = memchr (line, '\n', c->buffered - (size_t) (line - c->buffer)))) {
    if (answer_line (c, line, (size_t) (end - line)) == -1)
      return -1;
    line = end + 1;
  }
  c->buffered -= (size_t) (line - c->buffer);
  memmove (c->buffer, line, c->buffered);
  if (c->buffered < CONTROL_LINE_MAX)
    return 0;
  char *refusal = line_of (error_message (json_null (), REFUSED_BAD_REQUEST, "the line is longer than 64 KiB"));
  if (refusal && send_line (c, refusal, ANSWER_TIMEOUT_MS) == 0)
    discard_input (c);
  free (refusal);
  return -1;
}

static void *
client_main (void *opaque)
{
  struct control_client *c = opaque;
  int64_t next_progress_us = 0, half_line_until_us = 0;

  for (;;) {
    struct pollfd fds[] = { { .fd = c->fd, .events = POLLIN },
                            { .fd = c->control->stop_fd, .events = POLLIN },
                            { .fd = c->event_fd, .events = POLLIN } };
    bool watching = c->event_fd != -1;
    bool copying = watching && status_has_progress (c->control->f);
    if (!copying)
      next_progress_us = in_ms (PROGRESS_INTERVAL_MS);
    /* Who begins a line has to end it; who is only quiet may stay. */
    if (c->buffered == 0)
      half_line_until_us = in_ms (HALF_LINE_TIMEOUT_MS);
    else if (now_us () >= half_line_until_us)
      break;
    int64_t until_us = c->buffered ? half_line_until_us : INT64_MAX;
    if (copying && next_progress_us < until_us)
      until_us = next_progress_us;
    else if (watching && in_ms (PROGRESS_INTERVAL_MS) < until_us)
      until_us = in_ms (PROGRESS_INTERVAL_MS);
    int r = poll (fds, watching ? 3 : 2, until_us == INT64_MAX ? -1 : poll_timeout_ms (until_us));
    if (r == -1 && errno != EINTR)
      break;
    if (fds[1].revents)
      break;
    bool tell = copying && now_us () >= next_progress_us;
    if (watching && fds[2].revents) {
      uint64_t seen;
      tell = read (c->event_fd, &seen, sizeof seen) > 0 || tell;
    }
    if (tell) {
      next_progress_us = in_ms (PROGRESS_INTERVAL_MS);
      if (send_event (c) == -1)
        break;
    }
    if (fds[0].revents && take_input (c) == -1)
      break;
  }
  unwatch (c);
  close (c->fd);
  LOCK_FOR_CURRENT_SCOPE (&c->control->mu);
  c->ended = true;
  pthread_cond_signal (&c->control->client_ended);
  return NULL;
}

/* A slot whose thread has ended is joined and used again.  A client that has just closed may not have been
   noticed yet by its thread: a moment's grace, so that its place counts as free. */
static struct control_client *
free_slot (struct control *control)
{
  struct timespec until = deadline_timespec (in_ms (SLOT_GRACE_MS));

  LOCK_FOR_CURRENT_SCOPE (&control->mu);
  do
    for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++) {
      struct control_client *c = &control->clients[i];
      if (c->used && c->ended) {
        pthread_join (c->thread, NULL); /* it needs nothing but this lock, and has given it back */
        c->used = false;
      }
      if (!c->used)
        return c;
    }
  while (pthread_cond_clockwait (&control->client_ended, &control->mu, CLOCK_MONOTONIC, &until) == 0);
  return NULL;
}

static void
take_client (struct control *control)
{
  int fd = accept4 (control->listen_fd, NULL, NULL, SOCK_CLOEXEC);

  if (fd == -1)
    return;
  struct control_client *c = free_slot (control);
  if (c) {
    c->control = control;
    c->fd = fd;
    c->event_fd = -1;
    c->buffered = 0;
    c->ended = false;
    c->used = pthread_create (&c->thread, NULL, client_main, c) == 0;
    if (c->used)
      return;
  }
  struct control_client refused = { .control = control, .fd = fd };
  char *line = line_of (error_message (json_null (), REFUSED_INTERNAL, "too many clients (16)"));
  if (line)
    send_line (&refused, line, 0);
  free (line);
  close (fd);
}

static void *
accept_main (void *opaque)
{
  struct control *control = opaque;

  for (;;) {
    struct pollfd fds[]
      = { { .fd = control->listen_fd, .events = POLLIN }, { .fd = control->stop_fd, .events = POLLIN } };
    if (poll (fds, 2, -1) == -1 && errno != EINTR)
      return NULL;
    if (fds[1].revents)
      return NULL;
    if (fds[0].revents)
      take_client (control);
  }
}

static int
listen_on (const char *path)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };

  if (strlen (path) >= sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    return -1;
  }
  strcpy (address.sun_path, path);
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd == -1)
    return -1;
  /* What a killed filter left: the supervisor's lock says that there is no other one. */
  unlink (path);
  /* fchmod before bind makes the socket appear with its mode (unix(7)); the umask of nbdkit is not ours to change. */
  if (fchmod (fd, 0600) == -1 || bind (fd, (const struct sockaddr *) &address, sizeof address) == -1
      || chmod (path, 0600) == -1 || listen (fd, CONTROL_CLIENTS_MAX) == -1) {
    int err = errno;
    close (fd);
    errno = err;
    return -1;
  }
  return fd;
}

struct control *
control_start (struct filter *f, const char *socket_path)
{
  struct control *control = calloc (1, sizeof *control);

  if (!control)
    return NULL;
  control->f = f;
  text_copy (control->path, sizeof control->path, socket_path);
  pthread_mutex_init (&control->mu, NULL);
  pthread_cond_init (&control->client_ended, NULL);
  control->stop_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  control->listen_fd = listen_on (socket_path);
  int err = errno;
  if (control->stop_fd != -1 && control->listen_fd != -1) {
    err = pthread_create (&control->thread, NULL, accept_main, control);
    if (err == 0)
      return control;
  }
  if (control->listen_fd != -1)
    close (control->listen_fd);
  if (control->stop_fd != -1)
    close (control->stop_fd);
  free (control);
  errno = err;
  return NULL;
}

void
control_stop (struct control *control)
{
  const uint64_t one = 1;

  if (!control)
    return;
  ssize_t n = write (control->stop_fd, &one, sizeof one);
  (void) n;
  pthread_join (control->thread, NULL);
  for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++)
    if (control->clients[i].used)
      pthread_join (control->clients[i].thread, NULL);
  unlink (control->path);
  close (control->listen_fd);
  close (control->stop_fd);
  pthread_cond_destroy (&control->client_ended);
  pthread_mutex_destroy (&control->mu);
  free (control);
}
