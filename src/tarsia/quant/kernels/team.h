/* Work spread over the threads of a runtime that is there already. */
#ifndef TARSIA4_TEAM_H
#define TARSIA4_TEAM_H

#include "tarsia4.h"

typedef void (*tarsia4_work)(void *job, int64_t first, int64_t last);

/* work(job, ...) over 0..units-1 in contiguous bands. `cost`: about how many numbers a unit touches; a little work
 * is not worth a wake-up and stays with the calling thread. */
void tarsia4_spread(const tarsia4_team *team, int64_t units, int64_t cost, tarsia4_work work, void *job);

#endif
