/* A mirror behind an NBD server (libnbd): an export per disk and one with the superblock.
 *
 * Per disk one connection for asking about zeroes, and as many plain ones as there may be writers, when the
 * server promises that a flush on one connection covers what was answered on the others (multi-conn); else
 * one.  All are made when the session is opened and never later: a connection that is made in the middle
 * could reach a new incarnation of the server, which does not have what the old one took.
 */
#pragma once

#include "config.h"
#include "mirror_dev.h"

#define NBD_CONNECTIONS_PER_DISK 16u
#define NBD_CONNECTIONS_TOTAL 64u /* QEMU's server takes 100 by default since 9.1 */

struct mirror_dev *nbd_mirror_new (const struct config *config);
void nbd_mirror_free (struct mirror_dev *dev);
