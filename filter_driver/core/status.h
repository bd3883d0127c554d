/* The answer to `status` (docs/control-protocol.md): short locks only, never behind I/O. */
#pragma once

#include <jansson.h>

#include "filter.h"

/* A new reference, NULL without memory. */
json_t *status_json (struct filter *f);
/* Whether a copy runs: subscribers then get a status every second. */
bool status_has_progress (struct filter *f);
