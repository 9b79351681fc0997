/* What one instruction set does: steps over a few hundred numbers in the cache. */
#ifndef TARSIA_MERGE_STEPS_H
#define TARSIA_MERGE_STEPS_H

#include "numbers.h"
#include "tarsia_merge.h"

enum { TILE_ROWS = 4, TILE_COLUMNS = 512 };

typedef struct {
    /* out[rows][TILE_COLUMNS] = up[rows][rank] down[rank][.. width], where down's rows are `columns` apart. */
    void (*product)(const float *up, const float *down, int64_t rank, int64_t columns, int64_t rows, int64_t width,
                    float *out);
    /* How many magnitudes have bits above `high`; *top grows to the largest bits seen. */
    int64_t (*above)(const float *x, int64_t n, uint32_t high, uint32_t *top);
    /* The places, in order, of the magnitudes whose bits are low..low + span; n <= TILE_COLUMNS. Returns how many. */
    int64_t (*between)(const float *x, int64_t n, uint32_t low, uint32_t span, uint32_t *places);
    /* out = x where the bits of its magnitude are at least `least`, else 0. */
    void (*trim)(const float *x, int64_t n, uint32_t least, float *out);
    /* out = x / density where the random number of place + i is below limit, else 0. */
    void (*drop)(const float *x, int64_t n, const tarsia_merge_mask *mask, int64_t place, float *out);
    void (*elect)(const float *const *x, int64_t count, int64_t n, const float *votes, const float *weights,
                  const float *shares, float *out);
    void (*sum)(const float *const *x, int64_t count, int64_t n, const float *weights, float *out);
} tarsia_merge_steps;

/* The bits of |x|: they are in the order of the magnitudes. */
static inline uint32_t magnitude(float x) { return float_bits(x) & 0x7fffffffu; }

extern const tarsia_merge_steps tarsia_merge_portable;
extern const tarsia_merge_steps tarsia_merge_avx2;
extern const tarsia_merge_steps tarsia_merge_avx512;

#endif
