/* A private folder for one test, on memory when there is one; gone when the test ends well. */
#pragma once

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

static inline int
scratch_unlink (const char *path, const struct stat *st, int type, struct FTW *walk)
{
  (void) st;
  (void) type;
  (void) walk;
  return remove (path);
}

static inline void
scratch_make (char path[64])
{
  snprintf (path, 64, "%s/vmtXXXXXX", access ("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  CHECK (mkdtemp (path));
}

static inline void
scratch_remove (const char *path)
{
  CHECK (nftw (path, scratch_unlink, 16, FTW_DEPTH | FTW_PHYS) == 0);
}
