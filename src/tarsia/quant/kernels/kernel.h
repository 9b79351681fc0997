/* What one instruction set provides. Threads, ranges, partial blocks, nested scales and argument checks are tarsia4.c's:
 * a kernel sees whole blocks of 64 alone, with their scales as float32. */
#ifndef TARSIA4_KERNEL_H
#define TARSIA4_KERNEL_H

#include "numbers.h"
#include "tarsia4.h"

enum { VECTOR_BLOCK = 64, ROWS_AT_ONCE = 16 };

/* Levels in rising order: the code of a scaled number v is order[number of bounds below v], so that a number on a bound
 * takes the lower level. bounds[15] is an infinity, there to fill a register. */
typedef struct {
    float bounds[16];
    uint8_t order[16];
} tarsia4_grid;

typedef struct {
    /* `blocks` whole blocks -> 64 * blocks numbers of `dtype`. */
    void (*decode)(const uint8_t *codes, const float *scales, int64_t blocks, const float *levels, void *out,
                   int dtype);
    /* The way back; 0, or TARSIA4_NOT_FINITE. */
    int (*encode)(const void *w, int dtype, int64_t blocks, const tarsia4_grid *grid, uint8_t *codes, float *absmax);
    /* sums[i] += w[0..n-1] . x[i * stride + 0..n-1] for i < m <= ROWS_AT_ONCE. */
    void (*dot)(const float *w, const float *x, int64_t stride, int64_t n, int64_t m, float *sums);

    /* The product on packed codes, or NULL everywhere: then rows are decoded piece by piece and given to `dot`.
     * A row of x is brought into the order in which codes leave a register, `arranged(columns)` bytes of it. */
    int64_t (*arranged)(int64_t columns);
    void (*arrange)(const void *x, int dtype, int64_t columns, void *out);
    /* sums[i] += (`blocks` blocks) . (row i of the arranged x, `stride` bytes apart) for i < m <= ROWS_AT_ONCE;
     * only the last call for a row of weights may have an odd number of blocks. */
    void (*multiply)(const uint8_t *codes, const float *scales, int64_t blocks, const float *levels,
                     const void *arranged, int64_t stride, int64_t m, float *sums);
} tarsia4_kernel;

extern const tarsia4_kernel tarsia4_kernel_portable, tarsia4_kernel_avx2, tarsia4_kernel_avx512,
    tarsia4_kernel_avx512_bf16, tarsia4_kernel_neon;

/* portable.c, for what a kernel does not take: numbers first..last-1 of the weight, and one block (the last one, where
 * `whole` is 0, is scaled by a division, as bitsandbytes does it). */
void tarsia4_decode_span(const tarsia4_weight *weight, int64_t first, int64_t last, void *out, int dtype);
int tarsia4_encode_block(const void *w, int dtype, int64_t first, int64_t n, int whole, const tarsia4_grid *grid,
                         uint8_t *codes, float *absmax);

static inline float block_scale(const tarsia4_weight *weight, int64_t block) {
    if (weight->absmax) return weight->absmax[block];
    /* Two statements, and -ffp-contract=off: bitsandbytes rounds the product and the sum apart. */
    float product = weight->scale_levels[weight->scale_codes[block]] * weight->scale_absmax[block / 256];
    return product + weight->offset;
}

#endif
