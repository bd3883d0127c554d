/* A small file that is replaced durably: temporary file, fsync, rename, fsync of the directory. */
#pragma once

#include <stddef.h>

/* -1 with errno; the old contents stay then. */
int durable_replace (const char *path, const void *data, size_t size);
int durable_sync_directory_of (const char *path);
