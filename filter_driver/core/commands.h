/* The state-changing commands of the control protocol beside the resync (resync.h).  Callers have
 * begun an operation (filter_begin_operation). */
#pragma once

#include "resync.h"

int command_barrier (struct filter *f, struct refusal *refusal);
int command_pause (struct filter *f, const char *reason, struct refusal *refusal);
int command_resume (struct filter *f, struct refusal *refusal);
int command_detach (struct filter *f, struct refusal *refusal);
int command_fence (struct filter *f, const char *reason, struct refusal *refusal);
