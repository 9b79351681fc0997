/* The steps in plain C, for a compiler to do many numbers at a time with the flags of the including source, which has
 * defined STEPS, the name of its table, and LANES, how many numbers a register has. What it defines besides (HAS_...)
 * it does by hand. */
#include "steps.h"

#include <math.h>

#if !defined(HAS_PRODUCT)
static void product(const float *up, const float *down, int64_t rank, int64_t columns, int64_t rows, int64_t width,
                    float *out) {
    for (int64_t r = 0; r < rows; r++, up += rank, out += TILE_COLUMNS) {
        for (int64_t j = 0; j < width; j++) out[j] = 0.0f;
        for (int64_t k = 0; k < rank; k++) {
            const float *row = down + k * columns, by = up[k];
            for (int64_t j = 0; j < width; j++) out[j] = fmaf(by, row[j], out[j]);
        }
    }
}
#endif

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

/* Philox4x32-10 (Salmon et al., SC 2011): 4 words from a key of 64 bits and a counter, whose upper 64 bits are 0. */
static void drop(const float *x, int64_t n, const tarsia_merge_mask *mask, int64_t place, float *out) {
    enum { AT_ONCE = 64 };
    uint64_t limit = (uint64_t)mask->limit;
    for (int64_t at = 0; at < n;) {
        uint32_t a[AT_ONCE], b[AT_ONCE], c[AT_ONCE], d[AT_ONCE], words[4 * AT_ONCE];
        uint64_t first = (uint64_t)(place + at) / 4;
        for (int i = 0; i < AT_ONCE; i++) {
            uint64_t counter = first + (uint64_t)i;
            a[i] = (uint32_t)counter, b[i] = (uint32_t)(counter >> 32), c[i] = d[i] = 0;
        }
        uint32_t k0 = (uint32_t)mask->key, k1 = (uint32_t)((uint64_t)mask->key >> 32);
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
            for (int i = 0; i < AT_ONCE; i++) {
                uint64_t p = (uint64_t)a[i] * 0xD2511F53u, q = (uint64_t)c[i] * 0xCD9E8D57u;
                a[i] = (uint32_t)(q >> 32) ^ b[i] ^ k0, c[i] = (uint32_t)(p >> 32) ^ d[i] ^ k1;
                b[i] = (uint32_t)q, d[i] = (uint32_t)p;
            }
        for (int i = 0; i < AT_ONCE; i++)
            words[4 * i] = a[i], words[4 * i + 1] = b[i], words[4 * i + 2] = c[i], words[4 * i + 3] = d[i];
        int64_t skipped = (place + at) % 4, left = n - at, some = 4 * AT_ONCE - skipped;
        if (some > left) some = left;
        for (int64_t i = 0; i < some; i++)
            out[at + i] = words[skipped + i] < limit ? x[at + i] / mask->density : 0.0f;
        at += some;
    }
}

/* As many numbers as a register has, and the bits of each. */
typedef float numbers __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t words __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline numbers load(const float *x) {
    numbers all;
    memcpy(&all, x, sizeof all);
    return all;
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
