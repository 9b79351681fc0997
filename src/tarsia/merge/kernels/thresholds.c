/* The k-th largest magnitude of a change, reading it once where nothing is unusual.
 *
 * A sample says between which two magnitudes it must nearly lie. One pass counts what is above them and collects what
 * is between; among those it is selected by the digits of its bits. Where the sample was wrong, or too many are equal,
 * the digits of all numbers are counted instead, in a pass for each. */
#include "numbers.h"
#include "select.h"
#include "team.h"
#include "tiles.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t INFINITE = 0x7f800000u;

enum { SAMPLES = 1 << 14, SMALL = 1 << 16 };
static const double DEVIATIONS = 4.0; /* of the rank that the sample estimates: beyond them once in 16,000 */

typedef struct {
    grid all;
    const tarsia_merge_delta *delta;
    const tarsia4_team *team;
    int64_t kept;
    /* what the sample says */
    uint32_t low, high;
    /* what the pass finds */
    int64_t room, count, above;
    uint32_t *bits;
    int64_t *places;
    int not_finite;
    /* what the digits of all numbers say */
    selection found;
    int digit;
    int64_t histogram[DIGIT_VALUES], cut;
} search;

/* What one band of work has seen, before it is added to what all have. */
typedef struct {
    int64_t above;
    uint32_t top;
} tally;

typedef void (*visitor)(search *job, tally *seen, const float *x, int64_t n, int64_t place);

/* Shows the numbers of some bands to `visit`, a piece of a row at a time, in the order of their places but for the
 * rows of a tile. */
static tally walk(search *job, int64_t first, int64_t last, visitor visit) {
    float room[TILE_ROWS * TILE_COLUMNS];
    tally seen = {0, 0};
    int64_t stride;
    for (int64_t band = first; band < last; band++)
        for (int64_t t = 0; t < tiles_of(&job->all); t++) {
            tile at = tile_at(&job->all, band, t);
            const float *x = numbers_of(&job->all, job->delta, &at, room, &stride);
            for (int64_t r = 0; r < at.rows; r++)
                visit(job, &seen, x + r * stride, at.width, place_of(&job->all, &at, r));
        }
    return seen;
}

static float number_of(const search *job, int64_t place) {
    const tarsia_merge_delta *delta = job->delta;
    if (delta->dense) return delta->dense[place];
    const float *up = delta->up + place / job->all.columns * delta->rank, *down = delta->down + place % job->all.columns;
    float x = 0.0f;
    for (int64_t k = 0; k < delta->rank; k++) x = fmaf(up[k], down[k * job->all.columns], x);
    return x;
}

/* Between which magnitudes the kept-th is to be looked for; a zero is never looked for, for it adds nothing. */
static int bound(search *job, int64_t n) {
    job->low = 1, job->high = INFINITE - 1, job->room = n;
    if (n <= SMALL) return TARSIA_MERGE_OK;
    uint32_t *sample = malloc(SAMPLES * sizeof *sample);
    if (!sample) return TARSIA_MERGE_NO_MEMORY;
    uint64_t state = 0x9E3779B97F4A7C15u;
    for (int i = 0; i < SAMPLES; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sample[i] = magnitude(number_of(job, (int64_t)((state >> 11) % (uint64_t)n)));
    }
    double share = (double)job->kept / (double)n, middle = share * SAMPLES;
    double off = DEVIATIONS * sqrt(share * (1.0 - share) * SAMPLES) + 4.0;
    int64_t first = (int64_t)(middle - off), last = (int64_t)(middle + off);
    if (first >= 1) job->high = tarsia_merge_select(sample, SAMPLES, first).bits;
    if (last <= SAMPLES) job->low = tarsia_merge_select(sample, SAMPLES, last).bits;
    free(sample);
    if (job->high >= INFINITE) job->high = INFINITE - 1;
    if (job->low < 1) job->low = 1;
    if (job->low > job->high) job->low = job->high;
    job->room = n / 8 + SMALL;
    return TARSIA_MERGE_OK;
}

static void look(search *job, tally *seen, const float *x, int64_t n, int64_t place) {
    uint32_t found[TILE_COLUMNS];
    seen->above += job->all.steps->above(x, n, job->high, &seen->top);
    int64_t some = job->all.steps->between(x, n, job->low, job->high - job->low, found);
    if (!some) return;
    int64_t at = __atomic_fetch_add(&job->count, some, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < some && at + i < job->room; i++) {
        job->bits[at + i] = magnitude(x[found[i]]);
        job->places[at + i] = place + found[i];
    }
}

static void scan(void *data, int64_t first, int64_t last) {
    search *job = data;
    tally seen = walk(job, first, last, look);
    __atomic_fetch_add(&job->above, seen.above, __ATOMIC_RELAXED);
    if (seen.top >= INFINITE) __atomic_store_n(&job->not_finite, 1, __ATOMIC_RELAXED);
}

static int ascending(const void *a, const void *b) {
    int64_t p = *(const int64_t *)a, q = *(const int64_t *)b;
    return (p > q) - (p < q);
}

/* Select among what was collected. Of equals those of the lowest places are kept: the cut is behind the last of them. */
static void among_collected(search *job) {
    job->found = tarsia_merge_select(job->bits, job->count, job->kept - job->above);
    if (job->found.rank == job->found.sharing) return;
    int64_t equals = 0;
    for (int64_t i = 0; i < job->count; i++)
        if (job->bits[i] == job->found.bits) job->places[equals++] = job->places[i];
    qsort(job->places, (size_t)equals, sizeof *job->places, ascending);
    job->cut = job->places[job->found.rank - 1] + 1;
}

static void count_digits(search *job, tally *seen, const float *x, int64_t n, int64_t place) {
    (void)seen, (void)place;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = magnitude(x[i]);
        if (in_play(bits, &job->found, job->digit)) job->histogram[digit_of(bits, job->digit)]++;
    }
}

/* Equals before the cut that is tried. */
static void count_equals(search *job, tally *seen, const float *x, int64_t n, int64_t place) {
    for (int64_t i = 0; i < n; i++) seen->above += magnitude(x[i]) == job->found.bits && place + i < job->cut;
}

static int64_t equals_before(search *job, int64_t band, int64_t cut) {
    job->cut = cut;
    return walk(job, band, band + 1, count_equals).above;
}

/* The least cut with as many equals before it as are kept: its band from the first on, then by halves. */
static int64_t cut_of(search *job, int64_t n) {
    int64_t wanted = job->found.rank, band = 0, some;
    for (; (some = equals_before(job, band, n)) < wanted; band++) wanted -= some;
    int64_t low = band * TILE_ROWS * job->all.columns, high = low + TILE_ROWS * job->all.columns;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (equals_before(job, band, middle) >= wanted) high = middle;
        else low = middle;
    }
    return high;
}

/* Select among all numbers: what is seldom needed, on this thread alone. */
static void among_all(search *job, int64_t n) {
    job->found = (selection){0, job->kept, n};
    for (job->digit = 0; job->digit < DIGITS; job->digit++) {
        memset(job->histogram, 0, sizeof job->histogram);
        walk(job, 0, bands_of(&job->all), count_digits);
        narrow(&job->found, job->histogram, job->digit);
    }
    job->cut = job->found.bits && job->found.rank < job->found.sharing ? cut_of(job, n) : n;
}

static int threshold(search *job, int64_t n) {
    int result = bound(job, n);
    if (result != TARSIA_MERGE_OK) return result;
    job->bits = malloc((size_t)job->room * sizeof *job->bits);
    job->places = malloc((size_t)job->room * sizeof *job->places);
    if (!job->bits || !job->places) result = TARSIA_MERGE_NO_MEMORY;
    else {
        tarsia4_spread(job->team, bands_of(&job->all), cost_of(&job->all, job->delta), scan, job);
        int64_t within = job->kept - job->above; /* 1..count where the sample was right */
        if (job->not_finite) result = TARSIA_MERGE_NOT_FINITE;
        else if (within >= 1 && within <= job->count && job->count <= job->room) among_collected(job);
        else if (within > job->count && job->low == 1) job->found.bits = 0; /* a zero */
        else among_all(job, n);
    }
    free(job->bits);
    free(job->places);
    return result;
}

int tarsia_merge_thresholds(int isa, const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns,
                            int64_t kept, tarsia_merge_mask *masks, const tarsia4_team *team) {
    const tarsia_merge_steps *steps = tarsia_merge_steps_of(isa);
    if (!steps) return TARSIA_MERGE_BAD_ISA;
    if (!tarsia_merge_sound(deltas, count, rows, columns) || (count && !masks)) return TARSIA_MERGE_BAD_ARGUMENT;
    int64_t n = rows * columns;
    if (kept < 0 || kept > n) return TARSIA_MERGE_BAD_ARGUMENT;
    for (int64_t i = 0; i < count && n; i++) {
        search job = {.all = {steps, rows, columns}, .delta = deltas + i, .team = team, .kept = kept ? kept : 1};
        job.cut = n;
        int result = threshold(&job, n);
        if (result != TARSIA_MERGE_OK) return result;
        masks[i].bits = kept ? job.found.bits : INFINITE;
        masks[i].cut = job.cut;
    }
    return TARSIA_MERGE_OK;
}
