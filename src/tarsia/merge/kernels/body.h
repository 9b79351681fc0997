/* The steps in plain C, for a compiler to do many numbers at a time with the flags of the including source, which has
 * defined STEPS, the name of its table, and LANES, how many numbers a register has. What it defines besides (HAS_...)
 * it does by hand. */
#include "steps.h"

#include <math.h>

/* As many numbers as a register has, and the bits of each. */
typedef float numbers __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t words __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline numbers load(const float *x) {
    numbers all;
    memcpy(&all, x, sizeof all);
    return all;
}

/* Rows of the product from column `from` on. */
static void product_rows(const float *up, const float *down, int64_t rank, int64_t columns, int64_t rows, int64_t from,
                         int64_t width, float *out) {
    for (int64_t r = 0; r < rows; r++, up += rank, out += TILE_COLUMNS) {
        for (int64_t j = from; j < width; j++) out[j] = 0.0f;
        for (int64_t k = 0; k < rank; k++) {
            const float *row = down + k * columns, by = up[k];
            for (int64_t j = from; j < width; j++) out[j] = fmaf(by, row[j], out[j]);
        }
    }
}

static void product(const float *up, const float *down, int64_t rank, int64_t columns, int64_t rows, int64_t width,
                    float *out) {
    int64_t done = 0;
#if defined(FUSED)
    /* Four rows by two registers: each number of down is read once for all of them, and sums stay in registers. */
    for (; rows == TILE_ROWS && done + 2 * LANES <= width; done += 2 * LANES) {
        numbers sums[TILE_ROWS][2] = {0};
        for (int64_t k = 0; k < rank; k++) {
            numbers a = load(down + k * columns + done), b = load(down + k * columns + done + LANES);
            for (int r = 0; r < TILE_ROWS; r++) {
                numbers by = up[r * rank + k] - (numbers){0};
                sums[r][0] = FUSED(by, a, sums[r][0]);
                sums[r][1] = FUSED(by, b, sums[r][1]);
            }
        }
        for (int r = 0; r < TILE_ROWS; r++) memcpy(out + r * TILE_COLUMNS + done, sums[r], sizeof sums[r]);
    }
#endif
    product_rows(up, down, rank, columns, rows, done, width, out);
}

static int64_t above(const float *x, int64_t n, uint32_t high, uint32_t *top) {
    uint32_t found = 0, most = *top;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = magnitude(x[i]);
        found += bits > high;
        most = bits > most ? bits : most;
    }
    *top = most;
    return found;
}

#if !defined(HAS_BETWEEN)
static int64_t between(const float *x, int64_t n, uint32_t low, uint32_t span, uint32_t *places) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        places[found] = (uint32_t)i; /* stays if it is one: no branch that nobody foresees */
        found += magnitude(x[i]) - low <= span;
    }
    return found;
}
#endif

static void trim(const float *x, int64_t n, uint32_t least, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = magnitude(x[i]) >= least ? x[i] : 0.0f;
}

/* Counters in the lower halves of 64 bits; what stands in the upper halves does not matter. */
typedef uint64_t wide __attribute__((vector_size(LANES * sizeof(float))));
#if !defined(TIMES)
#define TIMES(a, b) (((a) & 0xffffffffu) * ((b) & 0xffffffffu))
#endif
#if LANES == 4
#define LOWER {0, 2}
#define UPPER {1, 3}
#elif LANES == 8
#define LOWER {0, 4, 1, 5}
#define UPPER {2, 6, 3, 7}
#else
#define LOWER {0, 8, 1, 9, 2, 10, 3, 11}
#define UPPER {4, 12, 5, 13, 6, 14, 7, 15}
#endif

enum { BESIDE = 4, COUNTERS = BESIDE * LANES / 2 };

/* Philox4x32-10 (Salmon et al., SC 2011): 4 words for each of COUNTERS counters from `first` on. */
static void draw(uint64_t key, uint64_t first, uint32_t *out) {
    wide a[BESIDE], b[BESIDE], c[BESIDE] = {{0}}, d[BESIDE] = {{0}};
    const wide by = (wide){0} + 0xD2511F53u, with = (wide){0} + 0xCD9E8D57u, low = (wide){0} + 0xffffffffu;
    for (int i = 0; i < BESIDE; i++) {
        for (int lane = 0; lane < LANES / 2; lane++) a[i][lane] = first + (uint64_t)(i * LANES / 2 + lane);
        b[i] = a[i] >> 32;
    }
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < BESIDE; i++) {
            wide p = (wide)TIMES(a[i], by), q = (wide)TIMES(c[i], with);
            a[i] = (q >> 32) ^ b[i] ^ k0, c[i] = (p >> 32) ^ d[i] ^ k1;
            b[i] = q, d[i] = p;
        }
    for (int i = 0; i < BESIDE; i++) {
        wide ab = (a[i] & low) | b[i] << 32, cd = (c[i] & low) | d[i] << 32;
        wide words[2] = {__builtin_shuffle(ab, cd, (wide)LOWER), __builtin_shuffle(ab, cd, (wide)UPPER)};
        memcpy(out + i * 2 * LANES, words, sizeof words);
    }
}

static void drop(const float *x, int64_t n, const tarsia_merge_mask *mask, int64_t place, float *out) {
    uint32_t drawn[4 * COUNTERS], limit = (uint32_t)mask->limit;
    float density = mask->density;
    for (int64_t at = 0; at < n;) {
        int64_t skipped = (place + at) % 4, some = 4 * COUNTERS - skipped;
        draw((uint64_t)mask->key, (uint64_t)(place + at) / 4, drawn);
        if (some > n - at) some = n - at;
        for (int64_t i = 0; i < some; i++) out[at + i] = drawn[skipped + i] < limit ? x[at + i] / density : 0.0f;
        at += some;
    }
}

/* x where `when` is all ones, +0 where it is 0. */
static inline numbers where(words when, numbers x) { return (numbers)((words)x & when); }

/* LANES numbers from x[k] + at on. */
static inline void elect_some(const float *const *x, int64_t count, int64_t at, const float *votes,
                              const float *weights, const float *shares, float *out) {
    numbers total = {0}, sums = {0}, parts = {0};
    for (int64_t k = 0; k < count; k++) total += votes[k] * load(x[k] + at);
    words minus = ~(words)(total >= 0.0f) & INT32_MIN; /* the sign to be turned, where - is elected */
    for (int64_t k = 0; k < count; k++) {
        numbers one = load(x[k] + at);
        words agrees = (numbers)((words)(votes[k] * one) ^ minus) > 0.0f;
        sums += where(agrees, weights[k] * one);
        parts += where(agrees, shares[k] - (numbers){0});
    }
    words none = (numbers)((words)parts & INT32_MAX) < 1e-8f;
    numbers found = sums / (numbers)(((words)parts & ~none) | ((words)(1.0f - (numbers){0}) & none));
    memcpy(out + at, &found, sizeof found);
}

static void elect(const float *const *x, int64_t count, int64_t n, const float *votes, const float *weights,
                  const float *shares, float *out) {
    int64_t whole = n / LANES * LANES;
    for (int64_t at = 0; at < whole; at += LANES) elect_some(x, count, at, votes, weights, shares, out);
    for (int64_t at = whole; at < n; at++) {
        float total = 0.0f, sums = 0.0f, parts = 0.0f;
        for (int64_t k = 0; k < count; k++) total += votes[k] * x[k][at];
        for (int64_t k = 0; k < count; k++) {
            float voted = votes[k] * x[k][at];
            if (total >= 0.0f ? voted > 0.0f : voted < 0.0f) sums += weights[k] * x[k][at], parts += shares[k];
        }
        out[at] = sums / (fabsf(parts) < 1e-8f ? 1.0f : parts);
    }
}

static void sum(const float *const *x, int64_t count, int64_t n, const float *weights, float *out) {
    float sums[TILE_COLUMNS] = {0};
    for (int64_t k = 0; k < count; k++) {
        const float *one = x[k], weight = weights[k];
        for (int64_t i = 0; i < n; i++) sums[i] += weight * one[i];
    }
    for (int64_t i = 0; i < n; i++) out[i] = sums[i];
}

const tarsia_merge_steps STEPS = {product, above, between, trim, drop, elect, sum};
