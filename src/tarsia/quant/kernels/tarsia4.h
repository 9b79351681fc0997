/* Four-bit weights on the processor: the binary interface of the one shared library.
 *
 * A weight is rows x columns numbers, row by row, cut into blocks of `block` numbers; a block may cross rows when
 * columns is no multiple of it. Each number is the place of a level (0..15), two to a byte, the first in the high
 * half; it stands for levels[code] * scale of its block. Scales are float32 (`absmax`) or, nested, 8-bit codes:
 * scale = scale_levels[code] * scale_absmax[place of the block / 256] + offset, product and sum rounded apart.
 *
 * Bits: tarsia4_quantise and tarsia4_dequantise give the same bits on every instruction set, those of bitsandbytes 0.50
 * on a processor. tarsia4_rows agrees to within the rounding of its order of summation; with bfloat16 x and
 * TARSIA4_AVX512_BF16 the levels (not the scales) are rounded to bfloat16 as well, 2^-9 of a weight at most, which is
 * what a dense bfloat16 weight has lost too, and subnormal numbers count for zero.
 *
 * No function keeps state, prints or exits; every one may be called from several threads at once. */
#ifndef TARSIA4_H
#define TARSIA4_H

#include <stdint.h>

#define TARSIA4_ABI 1

enum tarsia4_isa { TARSIA4_PORTABLE, TARSIA4_AVX2, TARSIA4_AVX512, TARSIA4_AVX512_BF16, TARSIA4_NEON };
enum tarsia4_dtype { TARSIA4_FLOAT32, TARSIA4_BFLOAT16, TARSIA4_FLOAT16 };
enum tarsia4_result {
    TARSIA4_OK = 0,
    TARSIA4_BAD_ARGUMENT = -1, /* a size, dtype, pointer or range that the function does not take */
    TARSIA4_BAD_ISA = -2,      /* not compiled in, or not executable here (see tarsia4_supported) */
    TARSIA4_NOT_FINITE = -3,   /* quantise: the weight holds an infinity or a NaN; the outputs are then undefined */
    TARSIA4_NO_MEMORY = -4
};

typedef struct {
    const uint8_t *codes;       /* ceil(rows * columns / 2) bytes */
    const float *levels;        /* 16 */
    const float *absmax;        /* ceil(rows * columns / block), or NULL when nested */
    const uint8_t *scale_codes; /* nested: one a block */
    const float *scale_levels;  /* nested: 256 */
    const float *scale_absmax;  /* nested: one for each 256 blocks */
    float offset;               /* nested: added to every scale */
    int64_t rows, columns, block;
} tarsia4_weight;

/* The threads of a runtime that the process has loaded already; `parallel` is GOMP_parallel or has its signature.
 * A NULL team, a NULL `parallel` or threads <= 1: the calling thread alone. Fewer threads than asked for are fine. */
typedef struct {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
    int threads;
} tarsia4_team;

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

int tarsia4_abi(void);

/* 1 when the instruction set is compiled in and this processor and system say that they run it, else 0. The functions
 * below take any that is compiled in: one that the processor does not have ends the process. */
int tarsia4_supported(int isa);

/* w: n numbers -> codes: ceil(n / 2) bytes, absmax: ceil(n / block). block: even, positive. The levels may stand in any
 * order; an odd n is filled up with one zero. */
int tarsia4_quantise(int isa, const void *w, int dtype, int64_t n, int64_t block, const float *levels, uint8_t *codes,
                     float *absmax, const tarsia4_team *team);

/* Rows row0..row1-1, columns col0..col1-1 -> out, `stride` (>= col1 - col0) elements of it from row to row. 8 MiB and
 * more go past the caches, where the instruction set can, `out` stands at a multiple of 64 bytes and its memory has
 * been written before. */
int tarsia4_dequantise(int isa, const tarsia4_weight *weight, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                       void *out, int dtype, int64_t stride, const tarsia4_team *team);

/* out[m][rows] = x[m][columns] W^T + bias[rows]; x, bias (or NULL) and out are of `dtype`, sums are float32. Meant
 * for few rows: the weight is read from memory once, and unpacked anew for every 8 of them at most. A row's bits do
 * not depend on the rows beside it, nor on threads. */
int tarsia4_rows(int isa, const tarsia4_weight *weight, const void *x, int dtype, int64_t m, const void *bias,
                 void *out, const tarsia4_team *team);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
