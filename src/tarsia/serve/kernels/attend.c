/* Attention over the line: rows, heads of the cache and pieces of long rows are spread over the team. */
#include "steps.h"
#include "team.h"

#include <stdlib.h>

enum { QUERIES = 96 }; /* tokens by heads that share a head of the cache, in one unit of work, about */

typedef struct {
    int32_t row, first, count;
} unit;

typedef struct {
    const tarsia_serve_steps *steps;
    tarsia_serve_queries of;
    int64_t heads, kv_heads, most;
    const int32_t *tables, *starts, *before;
    const unit *units;
    int result;
} job;

static void attend(void *data, int64_t first, int64_t last) {
    job *all = data;
    int64_t most = 0;
    for (int64_t i = first; i < last; i++) {
        const int64_t count = all->units[i / all->kv_heads].count;
        most = count > most ? count : most;
    }
    float *room = malloc((size_t)tarsia_serve_room(most * all->of.group, all->of.dim) * sizeof *room);
    if (!room) {
        __atomic_store_n(&all->result, TARSIA_SERVE_NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t i = first; i < last; i++) {
        const unit *u = all->units + i / all->kv_heads;
        const int64_t head = i % all->kv_heads;
        tarsia_serve_queries q = all->of;
        q.q = number_at(q.q, q.dtype, u->first * q.q_token + head * q.group * q.q_head);
        q.out = (char *)q.out + (u->first * q.out_token + head * q.group * q.dim) * number_size(q.dtype);
        q.keys = number_at(q.keys, q.dtype, head * q.dim), q.values = number_at(q.values, q.dtype, head * q.dim);
        q.table = all->tables + u->row * all->most;
        q.tokens = u->count, q.first = all->before[u->row] + u->first - all->starts[u->row];
        q.room = room;
        all->steps->attend(&q);
    }
    free(room);
}

/* Units of all rows and, in *work, about how many numbers are touched; -1 where a row reaches for what is not there. */
static int64_t units_of(const job *all, int64_t rows, int64_t blocks, int64_t some, unit *units, int64_t *work) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t tokens = all->starts[row + 1] - all->starts[row], before = all->before[row];
        if (all->starts[row] < 0 || tokens < 0 || before < 0) return -1;
        if (!tokens) continue;
        const int64_t last = (before + tokens - 1) / all->of.block;
        const int64_t low = all->of.window > 0 && before - all->of.window + 1 > 0 ? before - all->of.window + 1 : 0;
        if (last >= all->most) return -1;
        for (int64_t i = low / all->of.block; i <= last; i++) {
            const int32_t place = all->tables[row * all->most + i];
            if (place < 0 || place >= blocks) return -1;
        }
        for (int64_t first = 0; first < tokens; first += some, count++) {
            const int64_t n = tokens - first < some ? tokens - first : some;
            if (units) units[count] = (unit){(int32_t)row, (int32_t)(all->starts[row] + first), (int32_t)n};
            *work += (before + tokens - low) * all->of.dim * (2 + n * all->of.group / 2) * all->kv_heads;
        }
    }
    return count;
}

int tarsia_serve_attend(int isa, const void *q, int64_t tokens, int64_t q_token, int64_t q_head, int64_t heads, int64_t dim,
                        int dtype, const void *keys, const void *values, int64_t blocks, int64_t block, int64_t kv_heads,
                        const int32_t *tables, int64_t most, const int32_t *starts, const int32_t *before,
                        int64_t rows, float scale, int64_t window, float softcap, void *out, const tarsia4_team *team) {
    job all = {.steps = tarsia_serve_steps_of(isa), .heads = heads, .kv_heads = kv_heads, .most = most};
    if (!all.steps) return TARSIA_SERVE_BAD_ISA;
    if (heads <= 0 || dim <= 0 || kv_heads <= 0 || heads % kv_heads || block <= 0 || rows < 0 || most < 0)
        return TARSIA_SERVE_BAD_ARGUMENT;
    if (rows && starts[rows] > tokens) return TARSIA_SERVE_BAD_ARGUMENT;
    if (dtype != TARSIA4_FLOAT32 && dtype != TARSIA4_BFLOAT16) return TARSIA_SERVE_BAD_ARGUMENT;
    all.tables = tables, all.starts = starts, all.before = before;
    all.of = (tarsia_serve_queries){.q = q, .q_token = q_token, .q_head = q_head, .out_token = heads * dim, .out = out,
                                    .keys = keys, .values = values, .block = block, .position = kv_heads * dim,
                                    .group = heads / kv_heads, .dim = dim, .window = window, .dtype = dtype,
                                    .scale = scale, .softcap = softcap};
    const int64_t some = all.of.group < QUERIES ? QUERIES / all.of.group : 1;
    int64_t work = 0, count = units_of(&all, rows, blocks, some, NULL, &work);
    if (count <= 0) return count ? TARSIA_SERVE_BAD_ARGUMENT : TARSIA_SERVE_OK;
    unit *units = malloc((size_t)count * sizeof *units);
    if (!units) return TARSIA_SERVE_NO_MEMORY;
    units_of(&all, rows, blocks, some, units, &work);
    all.units = units;
    tarsia4_spread(team, count * kv_heads, work / 2 / (count * kv_heads), attend, &all);
    free(units);
    return all.result;
}
