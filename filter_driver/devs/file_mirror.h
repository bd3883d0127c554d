/* A mirror that the filter writes itself: raw images and the superblock as files, on the same host or on a
 * mounted datastore, without a server in between.
 *
 * Writes go with O_DIRECT through a per-thread io_uring (file_io.h), so that a datastore that hangs cannot
 * hold a thread longer than the deadline.  A request that does not fit the alignment goes through the page
 * cache, alone and followed by fdatasync: buffered and direct writes must never meet in one page.
 *
 * A session that was abandoned may have requests in the kernel.  They are kept (with their buffers), and the
 * images are not opened again before all of them have ended: none of them can land after newer data.
 *
 * While a session that writes is open it holds the locks that QEMU would take for a writer (byte ranges 100
 * and 200 of block/file-posix.c): a QEMU that boots this image, and we, exclude each other.
 */
#pragma once

#include "config.h"
#include "mirror_dev.h"

struct mirror_dev *file_mirror_new (const struct config *config);
void file_mirror_free (struct mirror_dev *dev);
