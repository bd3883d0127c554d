/* The part of systemd's sd_notify(3) that a unit with Type=notify and WatchdogSec= uses: READY=1 once, then
 * WATCHDOG=1 every quarter of WATCHDOG_USEC while the filter is well. */
#pragma once

#include "filter.h"

struct notify;

/* NULL with errno 0 when nobody asked to be notified (no NOTIFY_SOCKET). */
struct notify *notify_start (struct filter *f);
void notify_stop (struct notify *notify);
