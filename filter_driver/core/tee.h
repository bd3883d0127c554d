/* The guest's path: what the front end calls for each request.
 *
 * A *client* is one connection of the source's hypervisor to one disk's export.  All calls return within
 * the stall time of their arrival (plus scheduling), whatever the mirror does, and they have no result:
 * the filter abstains, the front end answers what it always answers.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "filter.h"

struct client {
  struct disk *disk;
  uint64_t connection;
};

/* A new connection: it becomes the disk's newest, and what the mirror may have missed while there was
   none makes a book necessary.  Waits until requests of older connections have ended; -1 with ETIMEDOUT
   when they have not within the stall time. */
int client_open (struct client *client, struct disk *disk);
void client_close (struct client *client);

void tee_write (struct client *client, const void *buf, uint32_t count, uint64_t offset, bool fua);
void tee_zero (struct client *client, uint32_t count, uint64_t offset, bool fua);
void tee_flush (struct client *client);

/* Waits until no request of the disk is left that had arrived by then; -1 with ETIMEDOUT. */
int tee_wait_requests (struct disk *disk, int64_t arrived_until_us, int64_t deadline_us);

/* From now on requests that come in wait for ever: the process is about to end. */
void tee_hold_requests (struct filter *f);

/* Age of the oldest request of any disk, 0 without one: for the watchdog. */
int64_t tee_oldest_request_us (struct filter *f);
