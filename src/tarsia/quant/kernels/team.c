#include "team.h"

enum { WORTH_A_THREAD = 1 << 16, BANDS_A_THREAD = 4 };

typedef struct {
    tarsia4_work work;
    void *job;
    int64_t units, bands, next;
} spread;

/* Every thread takes the next band until none is left: right however many threads the runtime really grants, and a
 * thread that the system holds up keeps little from the others. */
static void member(void *data) {
    spread *all = data;
    for (;;) {
        int64_t band = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
        if (band >= all->bands) return;
        int64_t size = all->units / all->bands, longer = all->units % all->bands;
        int64_t first = band * size + (band < longer ? band : longer);
        all->work(all->job, first, first + size + (band < longer));
    }
}

void tarsia4_spread(const tarsia4_team *team, int64_t units, int64_t cost, tarsia4_work work, void *job) {
    if (units <= 0) return;
    int64_t threads = team && team->parallel ? team->threads : 1;
    if (threads > units) threads = units;
    if (threads > units * cost / WORTH_A_THREAD) threads = units * cost / WORTH_A_THREAD;
    if (threads <= 1) {
        work(job, 0, units);
        return;
    }
    int64_t bands = threads * BANDS_A_THREAD;
    spread all = {work, job, units, bands < units ? bands : units, 0};
    team->parallel(member, &all, (unsigned)threads, 0);
}
