/* The public functions but the thresholds: arguments are checked, steps are taken, tiles are spread over the team. */
#include "tarsia_merge.h"

#include "team.h"
#include "tiles.h"

#include <stdlib.h>

int tarsia_merge_abi(void) { return TARSIA_MERGE_ABI; }

/* The build says by TARSIA_MERGE_HAVE_... which sources it has compiled in. */
const tarsia_merge_steps *tarsia_merge_steps_of(int isa) {
    switch (isa) {
    case TARSIA_MERGE_PORTABLE: return &tarsia_merge_portable;
#if defined(TARSIA_MERGE_HAVE_AVX2)
    case TARSIA_MERGE_AVX2: return &tarsia_merge_avx2;
#endif
#if defined(TARSIA_MERGE_HAVE_AVX512)
    case TARSIA_MERGE_AVX512: return &tarsia_merge_avx512;
#endif
    default: return NULL;
    }
}

static int executes(int isa) {
#if defined(__x86_64__)
    if (isa == TARSIA_MERGE_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == TARSIA_MERGE_AVX512)
        return executes(TARSIA_MERGE_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == TARSIA_MERGE_PORTABLE;
}

int tarsia_merge_supported(int isa) { return tarsia_merge_steps_of(isa) && executes(isa); }

int tarsia_merge_sound(const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns) {
    if (count < 0 || rows < 0 || columns < 0 || (count && !deltas)) return 0;
    if (rows && columns > INT64_MAX / 64 / rows) return 0;
    for (int64_t i = 0; i < count && rows > 0 && columns > 0; i++)
        if (!deltas[i].dense && (deltas[i].rank < 0 || (deltas[i].rank && (!deltas[i].up || !deltas[i].down)))) return 0;
    return 1;
}

typedef struct {
    grid all;
    const tarsia_merge_delta *deltas;
    int64_t count;
    const tarsia_merge_mask *masks;
    const float *votes, *weights, *shares; /* votes == NULL: a plain sum */
    float *out;
    int result;
} union_of;

static int not_finite(const union_of *job, const float *x, int64_t n) {
    uint32_t top = 0;
    job->all.steps->above(x, n, 0, &top);
    return top >= 0x7f800000u;
}

/* What stays of n <= TILE_COLUMNS numbers from `place` on: these themselves, or their copy in `room`. */
static const float *masked(const union_of *job, const tarsia_merge_mask *mask, const float *x, int64_t n, int64_t place,
                           float *room) {
    const tarsia_merge_steps *steps = job->all.steps;
    if (mask->bits) {
        int64_t before = mask->cut - place;
        if (before < 0) before = 0;
        if (before > n) before = n;
        steps->trim(x, before, mask->bits, room);
        steps->trim(x + before, n - before, mask->bits + 1, room + before);
        x = room;
    }
    if (mask->limit < (int64_t)1 << 32) {
        steps->drop(x, n, mask, place, room);
        x = room;
    }
    return x;
}

typedef struct {
    const float **numbers, **kept;
    int64_t *strides;
    float *products, *masked;
} rooms;

static int unite_tile(const union_of *job, const tile *at, rooms *at_hand) {
    const tarsia_merge_steps *steps = job->all.steps;
    for (int64_t k = 0; k < job->count; k++)
        at_hand->numbers[k] = numbers_of(&job->all, job->deltas + k, at,
                                         at_hand->products + k * TILE_ROWS * TILE_COLUMNS, at_hand->strides + k);
    for (int64_t r = 0; r < at->rows; r++) {
        int64_t place = place_of(&job->all, at, r);
        for (int64_t k = 0; k < job->count; k++) {
            const float *x = at_hand->numbers[k] + r * at_hand->strides[k];
            if (not_finite(job, x, at->width)) return TARSIA_MERGE_NOT_FINITE;
            at_hand->kept[k] =
                masked(job, job->masks + k, x, at->width, place, at_hand->masked + k * TILE_COLUMNS);
        }
        if (job->votes)
            steps->elect(at_hand->kept, job->count, at->width, job->votes, job->weights, job->shares, job->out + place);
        else steps->sum(at_hand->kept, job->count, at->width, job->weights, job->out + place);
    }
    return TARSIA_MERGE_OK;
}

static void unite_bands(void *data, int64_t first, int64_t last) {
    union_of *job = data;
    size_t count = (size_t)job->count;
    rooms at_hand = {malloc(count * sizeof(float *) + 1), malloc(count * sizeof(float *) + 1),
                     malloc(count * sizeof(int64_t) + 1),
                     malloc(count * TILE_ROWS * TILE_COLUMNS * sizeof(float) + 1),
                     malloc(count * TILE_COLUMNS * sizeof(float) + 1)};
    int result = TARSIA_MERGE_NO_MEMORY;
    if (at_hand.numbers && at_hand.kept && at_hand.strides && at_hand.products && at_hand.masked) {
        result = TARSIA_MERGE_OK;
        for (int64_t band = first; band < last && result == TARSIA_MERGE_OK; band++)
            for (int64_t t = 0; t < tiles_of(&job->all) && result == TARSIA_MERGE_OK; t++) {
                tile at = tile_at(&job->all, band, t);
                result = unite_tile(job, &at, &at_hand);
            }
    }
    if (result != TARSIA_MERGE_OK) __atomic_store_n(&job->result, result, __ATOMIC_RELAXED);
    free(at_hand.numbers), free(at_hand.kept), free(at_hand.strides), free(at_hand.products), free(at_hand.masked);
}

static int unite(int isa, union_of *job, const tarsia4_team *team) {
    job->all.steps = tarsia_merge_steps_of(isa);
    if (!job->all.steps) return TARSIA_MERGE_BAD_ISA;
    if (!tarsia_merge_sound(job->deltas, job->count, job->all.rows, job->all.columns)) return TARSIA_MERGE_BAD_ARGUMENT;
    if (job->count && (!job->masks || !job->weights)) return TARSIA_MERGE_BAD_ARGUMENT;
    if (job->all.rows * job->all.columns == 0) return TARSIA_MERGE_OK;
    if (!job->out) return TARSIA_MERGE_BAD_ARGUMENT;
    int64_t cost = 0;
    for (int64_t k = 0; k < job->count; k++) cost += cost_of(&job->all, job->deltas + k);
    tarsia4_spread(team, bands_of(&job->all), cost, unite_bands, job);
    return job->result;
}

int tarsia_merge_elect(int isa, const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns,
                       const tarsia_merge_mask *masks, const float *votes, const float *weights, const float *shares,
                       float *out, const tarsia4_team *team) {
    if (!votes || (count && !shares)) return TARSIA_MERGE_BAD_ARGUMENT;
    union_of job = {{NULL, rows, columns}, deltas, count, masks, votes, weights, shares, out, TARSIA_MERGE_OK};
    return unite(isa, &job, team);
}

int tarsia_merge_sum(int isa, const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns,
                     const tarsia_merge_mask *masks, const float *weights, float *out, const tarsia4_team *team) {
    union_of job = {{NULL, rows, columns}, deltas, count, masks, NULL, weights, NULL, out, TARSIA_MERGE_OK};
    return unite(isa, &job, team);
}
