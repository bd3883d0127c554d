#include "durable_file.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "scope.h"

int
durable_sync_directory_of (const char *path)
{
  char copy[PATH_MAX];

  if (strnlen (path, sizeof copy) == sizeof copy) {
    errno = ENAMETOOLONG;
    return -1;
  }
  strcpy (copy, path);
  CLEANUP_CLOSE int fd = open (dirname (copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  return fd == -1 ? -1 : fsync (fd);
}

static int
write_all (int fd, const void *data, size_t size)
{
  const uint8_t *p = data;

  while (size) {
    ssize_t n = write (fd, p, size);
    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1)
      return -1;
    p += n;
    size -= (size_t) n;
  }
  return 0;
}

int
durable_replace (const char *path, const void *data, size_t size)
{
  char temporary[PATH_MAX];

  if (snprintf (temporary, sizeof temporary, "%s.new", path) >= (int) sizeof temporary) {
    errno = ENAMETOOLONG;
    return -1;
  }
  CLEANUP_CLOSE int fd = open (temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd == -1)
    return -1;
  if (write_all (fd, data, size) == -1 || fsync (fd) == -1 || rename (temporary, path) == -1) {
    int err = errno;
    unlink (temporary);
    errno = err;
    return -1;
  }
  return durable_sync_directory_of (path);
}
