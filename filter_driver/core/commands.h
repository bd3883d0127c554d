/* The state-changing commands of the control protocol beside the resync (resync.h).  Callers have
 * begun an operation (filter_begin_operation). */
#pragma once

#include "resync.h"

int command_barrier (struct filter *f, struct refusal *refusal);
int command_pause (struct filter *f, const char *reason, struct refusal *refusal);
int command_resume (struct filter *f, struct refusal *refusal);
int command_detach (struct filter *f, struct refusal *refusal);
/* The fence does not wait for its turn: nothing is forwarded from the first step on, which needs no operation
   (one that is under way finds the link gone and the state terminal).  The second step is its answer: durable,
   and nothing of this filter is on its way to the mirror any more. */
int command_fence_now (struct filter *f, const char *reason, struct refusal *refusal);
int command_fence_durably (struct filter *f, struct refusal *refusal);
