/* vmirror-supervise: keeps one filter process alive; what a systemd unit with Type=notify, WatchdogSec=,
 * Restart=always and a .socket does on real hosts, for hosts and labs where there is none.
 *
 *   vmirror-supervise --listen SOCK --pid-file FILE --log FILE --watchdog-ms N -- PROGRAM ARGS...
 *
 * It holds the listening socket and hands it on as file descriptor 3 (LISTEN_FDS), so that a client which
 * connects while the filter is away waits in the backlog.  The filter says READY=1 and WATCHDOG=1 on
 * NOTIFY_SOCKET; one that is silent for the watchdog time is killed.  One that ends is started again: at once
 * the first time, then after a pause that doubles from 100 ms to 5 s and is forgotten when it stayed up for a
 * while.  SIGTERM or SIGINT end the filter (SIGKILL after 5 s) and then this process, with status 0.
 *
 * What comes in on NOTIFY_SOCKET counts only when the kernel says that the child has sent it.  It keeps no
 * state but the pid file, whose lock is the proof that it is the only one.  It does not become a daemon by itself, but does not end with its terminal either (SIGHUP).
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LISTEN_FD 3 /* sd_listen_fds(3): the first descriptor that is handed on */
#define BACKLOG 64
#define PAUSE_FIRST_MS 100
#define PAUSE_MAX_MS 5000
#define STAYED_UP_MS 10000
#define TERM_GRACE_MS 5000
#define START_GRACE_FACTOR 5 /* until READY=1: dirty maps are read at start */

struct supervisor {
  const char *listen_path, *pid_path, *log_path;
  char notify_path[sizeof ((struct sockaddr_un *) 0)->sun_path];
  int watchdog_ms;
  char **program;
  int listen_fd, notify_fd, signal_fd, pid_fd;
  pid_t child; /* 0: none */
  int64_t started_ms, heard_ms, next_start_ms, kill_ms;
  bool ready, stopping, killed_by_us;
  int pause_ms;
};

static int64_t
now_ms (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (int64_t) ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void __attribute__ ((format (printf, 1, 2)))
say (const char *fmt, ...)
{
  char line[512];
  va_list args;

  va_start (args, fmt);
  vsnprintf (line, sizeof line, fmt, args);
  va_end (args);
  dprintf (STDERR_FILENO, "vmirror-supervise: %s\n", line);
}

static void __attribute__ ((noreturn, format (printf, 1, 2)))
die (const char *fmt, ...)
{
  char line[512];
  va_list args;

  va_start (args, fmt);
  vsnprintf (line, sizeof line, fmt, args);
  va_end (args);
  dprintf (STDERR_FILENO, "vmirror-supervise: %s\n", line);
  exit (1);
}

static int
bind_unix (const char *path, int type)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };

  if (strlen (path) >= sizeof address.sun_path)
    die ("socket path %s is too long", path);
  strcpy (address.sun_path, path);
  int fd = socket (AF_UNIX, type | SOCK_CLOEXEC, 0);
  /* Left by one that was killed; the lock on the pid file says that nobody else serves it. */
  unlink (path);
  if (fd == -1 || fchmod (fd, 0600) == -1 || bind (fd, (const struct sockaddr *) &address, sizeof address) == -1
      || chmod (path, 0600) == -1)
    die ("socket %s: %m", path);
  return fd;
}

static void
take_pid_file (struct supervisor *s)
{
  /* Not truncated before the lock is ours: it holds the other one's number. */
  s->pid_fd = open (s->pid_path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (s->pid_fd == -1)
    die ("pid file %s: %m", s->pid_path);
  if (flock (s->pid_fd, LOCK_EX | LOCK_NB) == -1) {
    char other[32] = "";
    ssize_t n = read (s->pid_fd, other, sizeof other - 1);
    other[n > 0 ? n : 0] = '\0';
    other[strcspn (other, "\n")] = '\0';
    die ("another supervisor (pid %s) holds %s", other, s->pid_path);
  }
  /* One that was ending may have removed the file between our open and our lock. */
  struct stat ours, named;
  if (fstat (s->pid_fd, &ours) == -1 || stat (s->pid_path, &named) == -1 || ours.st_ino != named.st_ino)
    die ("pid file %s was removed by another supervisor that is ending; start again", s->pid_path);
  if (ftruncate (s->pid_fd, 0) == -1 || dprintf (s->pid_fd, "%d\n", (int) getpid ()) < 0)
    die ("pid file %s: %m", s->pid_path);
}

static void
redirect_output (const struct supervisor *s)
{
  int log = open (s->log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  int null = open ("/dev/null", O_RDONLY | O_CLOEXEC);

  if (log == -1 || null == -1)
    die ("log %s: %m", s->log_path);
  if (dup2 (null, STDIN_FILENO) == -1 || dup2 (log, STDOUT_FILENO) == -1 || dup2 (log, STDERR_FILENO) == -1)
    die ("log %s: %m", s->log_path);
  close (log);
  close (null);
}

static void
block_signals (struct supervisor *s)
{
  sigset_t set;

  signal (SIGHUP, SIG_IGN);
  signal (SIGPIPE, SIG_IGN);
  sigemptyset (&set);
  sigaddset (&set, SIGTERM);
  sigaddset (&set, SIGINT);
  sigaddset (&set, SIGCHLD);
  sigprocmask (SIG_BLOCK, &set, NULL);
  s->signal_fd = signalfd (-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  if (s->signal_fd == -1)
    die ("signalfd: %m");
}

/* -- the child -- */

static void __attribute__ ((noreturn))
become_program (const struct supervisor *s, pid_t parent)
{
  sigset_t none;
  char text[32];

  sigemptyset (&none);
  sigprocmask (SIG_SETMASK, &none, NULL);
  signal (SIGHUP, SIG_IGN);
  signal (SIGPIPE, SIG_DFL);
  /* A filter without its supervisor would have no watchdog and could not be ended by anybody's book. */
  prctl (PR_SET_PDEATHSIG, SIGTERM);
  if (getppid () != parent)
    _exit (1);
  if (s->listen_fd == LISTEN_FD) {
    if (fcntl (LISTEN_FD, F_SETFD, 0) == -1)
      _exit (1);
  } else if (dup2 (s->listen_fd, LISTEN_FD) == -1)
    _exit (1);
  snprintf (text, sizeof text, "%d", (int) getpid ());
  setenv ("LISTEN_PID", text, 1);
  setenv ("LISTEN_FDS", "1", 1);
  setenv ("NOTIFY_SOCKET", s->notify_path, 1);
  setenv ("WATCHDOG_PID", text, 1);
  snprintf (text, sizeof text, "%lld", (long long) s->watchdog_ms * 1000);
  setenv ("WATCHDOG_USEC", text, 1);
  execvp (s->program[0], s->program);
  say ("%s: %m", s->program[0]);
  _exit (127);
}

static void
schedule_start (struct supervisor *s)
{
  if (now_ms () - s->started_ms >= STAYED_UP_MS)
    s->pause_ms = 0;
  s->next_start_ms = now_ms () + s->pause_ms;
  s->pause_ms = s->pause_ms ? s->pause_ms * 2 : PAUSE_FIRST_MS;
  if (s->pause_ms > PAUSE_MAX_MS)
    s->pause_ms = PAUSE_MAX_MS;
}

static void
start_child (struct supervisor *s)
{
  pid_t parent = getpid ();

  s->started_ms = s->heard_ms = now_ms ();
  s->ready = s->killed_by_us = false;
  s->child = fork ();
  if (s->child == 0)
    become_program (s, parent);
  if (s->child == -1) {
    say ("fork: %m");
    s->child = 0;
    schedule_start (s);
    return;
  }
  say ("started pid %d", (int) s->child);
}

static void
reap (struct supervisor *s)
{
  int status;
  pid_t pid;

  while ((pid = waitpid (-1, &status, WNOHANG)) > 0) {
    if (pid != s->child)
      continue;
    if (WIFSIGNALED (status))
      say ("pid %d was ended by signal %d%s", (int) pid, WTERMSIG (status), s->killed_by_us ? " (ours)" : "");
    else
      say ("pid %d ended with status %d", (int) pid, WEXITSTATUS (status));
    s->child = 0;
    schedule_start (s);
  }
}

/* Any process of this user could write to the socket: only the child's own word counts. */
static void
hear (struct supervisor *s)
{
  char text[512], control[CMSG_SPACE (sizeof (struct ucred))];
  struct iovec iov = { text, sizeof text - 1 };

  for (;;) {
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    ssize_t n = recvmsg (s->notify_fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
      return;
    struct cmsghdr *c = CMSG_FIRSTHDR (&msg);
    if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_CREDENTIALS)
      continue;
    struct ucred cred;
    memcpy (&cred, CMSG_DATA (c), sizeof cred);
    if (cred.pid != s->child || s->child == 0)
      continue;
    text[n] = '\0';
    if (strstr (text, "READY=1") && !s->ready) {
      s->ready = true;
      s->heard_ms = now_ms ();
      say ("pid %d is ready", (int) s->child);
    }
    if (strstr (text, "WATCHDOG=1"))
      s->heard_ms = now_ms ();
  }
}

static void
check_watchdog (struct supervisor *s)
{
  int64_t allowed_ms = s->ready ? s->watchdog_ms : (int64_t) s->watchdog_ms * START_GRACE_FACTOR;

  if (s->child == 0 || s->stopping || s->killed_by_us || now_ms () - s->heard_ms < allowed_ms)
    return;
  say ("pid %d was silent for %lld ms: killed", (int) s->child, (long long) (now_ms () - s->heard_ms));
  kill (s->child, SIGKILL);
  s->killed_by_us = true;
}

static void
check_stopping (struct supervisor *s)
{
  if (!s->stopping || s->child == 0 || s->killed_by_us || now_ms () < s->kill_ms)
    return;
  say ("pid %d did not end within %d ms: killed", (int) s->child, TERM_GRACE_MS);
  kill (s->child, SIGKILL);
  s->killed_by_us = true;
}

static void
begin_stopping (struct supervisor *s)
{
  if (s->stopping)
    return;
  s->stopping = true;
  s->kill_ms = now_ms () + TERM_GRACE_MS;
  if (s->child) {
    kill (s->child, SIGTERM);
    kill (s->child, SIGCONT); /* a stopped one could not hear it */
  }
}

static void
take_signals (struct supervisor *s)
{
  struct signalfd_siginfo info;

  while (read (s->signal_fd, &info, sizeof info) == sizeof info)
    if (info.ssi_signo == SIGCHLD)
      reap (s);
    else {
      say ("signal %u: stopping", info.ssi_signo);
      begin_stopping (s);
    }
}

static int
next_timeout_ms (const struct supervisor *s)
{
  int64_t at = now_ms () + 1000;

  if (s->child == 0 && s->next_start_ms < at)
    at = s->next_start_ms;
  if (s->child && !s->stopping) {
    int64_t silent_ms = s->heard_ms + (s->ready ? s->watchdog_ms : (int64_t) s->watchdog_ms * START_GRACE_FACTOR);
    if (silent_ms < at)
      at = silent_ms;
  }
  if (s->stopping && s->kill_ms < at)
    at = s->kill_ms;
  return at > now_ms () ? (int) (at - now_ms ()) : s->killed_by_us ? 100 : 0;
}

static void
run (struct supervisor *s)
{
  while (!s->stopping || s->child) {
    if (!s->stopping && s->child == 0 && now_ms () >= s->next_start_ms)
      start_child (s);
    struct pollfd fds[] = { { .fd = s->signal_fd, .events = POLLIN }, { .fd = s->notify_fd, .events = POLLIN } };
    if (poll (fds, 2, next_timeout_ms (s)) == -1 && errno != EINTR)
      say ("poll: %m");
    hear (s);
    take_signals (s);
    check_watchdog (s);
    check_stopping (s);
  }
}

static void
parse (struct supervisor *s, int argc, char **argv)
{
  static const struct option options[] = { { "listen", required_argument, NULL, 'l' },
                                           { "pid-file", required_argument, NULL, 'p' },
                                           { "log", required_argument, NULL, 'g' },
                                           { "watchdog-ms", required_argument, NULL, 'w' },
                                           { 0 } };
  int c;

  while ((c = getopt_long (argc, argv, "+", options, NULL)) != -1)
    switch (c) {
    case 'l':
      s->listen_path = optarg;
      break;
    case 'p':
      s->pid_path = optarg;
      break;
    case 'g':
      s->log_path = optarg;
      break;
    case 'w': {
      char *end;
      long ms = strtol (optarg, &end, 10);
      if (*end || ms < 100 || ms > 3600000)
        die ("--watchdog-ms must be from 100 to 3600000");
      s->watchdog_ms = (int) ms;
      break;
    }
    default:
      exit (2);
    }
  s->program = argv + optind;
  if (!s->listen_path || !s->pid_path || !s->log_path || !s->watchdog_ms || !s->program[0]) {
    fprintf (stderr, "usage: vmirror-supervise --listen SOCK --pid-file FILE --log FILE --watchdog-ms N -- PROGRAM...\n");
    exit (2);
  }
}

int
main (int argc, char **argv)
{
  struct supervisor s = { .listen_fd = -1 };
  const int on = 1;

  parse (&s, argc, argv);
  take_pid_file (&s);
  if (snprintf (s.notify_path, sizeof s.notify_path, "%s.notify", s.listen_path) >= (int) sizeof s.notify_path)
    die ("socket path %s is too long", s.listen_path);
  s.listen_fd = bind_unix (s.listen_path, SOCK_STREAM);
  if (listen (s.listen_fd, BACKLOG) == -1)
    die ("socket %s: %m", s.listen_path);
  s.notify_fd = bind_unix (s.notify_path, SOCK_DGRAM);
  if (setsockopt (s.notify_fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) == -1)
    die ("socket %s: %m", s.notify_path);
  block_signals (&s);
  redirect_output (&s);
  run (&s);
  unlink (s.listen_path);
  unlink (s.notify_path);
  /* Removed while the lock is held: whoever opens it anew gets a new file. */
  unlink (s.pid_path);
  say ("stopped");
  return 0;
}
