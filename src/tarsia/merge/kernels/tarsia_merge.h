/* Several changes of one weight made one: the binary interface of the shared library.
 *
 * A change is rows x columns float32 numbers, dense, or a product of factors of which only tiles are ever made. What
 * is done to a number depends on its value and its place alone: no result depends on tiles, threads or the instruction
 * set. Sums run over the changes in their order, from +0 on, products and sums rounded apart; within a product of
 * factors they are fused, from the first rank to the last.
 *
 * No function keeps state, prints or exits; every one may be called from several threads at once. */
#ifndef TARSIA_MERGE_H
#define TARSIA_MERGE_H

#include "tarsia4.h" /* tarsia4_team */

#include <stdint.h>

#define TARSIA_MERGE_ABI 1

enum tarsia_merge_isa { TARSIA_MERGE_PORTABLE, TARSIA_MERGE_AVX2, TARSIA_MERGE_AVX512 };
enum tarsia_merge_result {
    TARSIA_MERGE_OK = 0,
    TARSIA_MERGE_BAD_ARGUMENT = -1, /* a size or pointer that the function does not take */
    TARSIA_MERGE_BAD_ISA = -2,      /* not compiled in, or not executable here */
    TARSIA_MERGE_NOT_FINITE = -3,   /* a change holds an infinity or a NaN; outputs are then undefined */
    TARSIA_MERGE_NO_MEMORY = -4
};

/* rows x columns numbers at `dense`, row by row; where that is NULL, up[rows][rank] down[rank][columns]. */
typedef struct {
    const float *dense, *up, *down;
    int64_t rank;
} tarsia_merge_delta;

/* Which numbers of a change stay. The one at `place`, whose magnitude has the bits m, stays where m > bits, or
 * m == bits and place < cut: bits == 0, cut >= rows * columns lets all stay. With limit < 2^32 it is further thrown away
 * unless its random number, the 32-bit word (place % 4) of Philox4x32-10 under `key` and the counter place / 4, is below
 * limit; what stays is divided by density. */
typedef struct {
    int64_t cut, key, limit;
    uint32_t bits;
    float density;
} tarsia_merge_mask;

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

int tarsia_merge_abi(void);

/* 1 when the instruction set is compiled in and this processor runs it, else 0. */
int tarsia_merge_supported(int isa);

/* masks[i].bits and .cut for the `kept` numbers of largest magnitude of each of `count` changes, of equal magnitudes
 * those of the lowest places. Where a zero would be among them, bits is 0 and cut is rows * columns; where none is to
 * be kept, bits is that of infinity. The other members are left as they are. */
int tarsia_merge_thresholds(int isa, const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns,
                            int64_t kept, tarsia_merge_mask *masks, const tarsia4_team *team);

/* out[place] = sum of weights[i] * x_i over the changes that agree / sum of shares[i] over them (over 1 where that is
 * below 1e-8); x_i is what stays of change i. The majority is + where the sum of votes[i] * x_i is at least 0, else -; change i
 * agrees where votes[i] * x_i is not 0 and has that sign. */
int tarsia_merge_elect(int isa, const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns,
                       const tarsia_merge_mask *masks, const float *votes, const float *weights, const float *shares,
                       float *out, const tarsia4_team *team);

/* out[place] = sum of weights[i] * x_i. */
int tarsia_merge_sum(int isa, const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns,
                     const tarsia_merge_mask *masks, const float *weights, float *out, const tarsia4_team *team);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
