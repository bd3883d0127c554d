/* The source's read-only NBD export, as a resync reads it (libnbd). */
#pragma once

#include "source_dev.h"

struct source_dev *nbd_source_new (void);
void nbd_source_free (struct source_dev *dev);
