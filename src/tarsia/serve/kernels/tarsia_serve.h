/* Serving on the processor: adapters of many rows over one line of tokens, and attention over a paged cache.
 *
 * A line is the tokens of all rows end to end: row i has those from starts[i] to starts[i + 1] - 1. Numbers are float32
 * or bfloat16; every sum is float32 and rounded once. The bits of a token depend on its own row alone, and not on how
 * the line is cut into calls or work into threads.
 *
 * No function keeps state, prints or exits; every one may be called from several threads at once. */
#ifndef TARSIA_SERVE_H
#define TARSIA_SERVE_H

#include "tarsia4.h"

#define TARSIA_SERVE_ABI 1

enum tarsia_serve_isa { TARSIA_SERVE_PORTABLE, TARSIA_SERVE_AVX2, TARSIA_SERVE_AVX512 };
enum tarsia_serve_kind { TARSIA_SERVE_THIN, TARSIA_SERVE_NECK };
enum tarsia_serve_result {
    TARSIA_SERVE_OK = 0,
    TARSIA_SERVE_BAD_ARGUMENT = -1, /* a size, dtype, pointer, entry, block or slot that the function does not take */
    TARSIA_SERVE_BAD_ISA = -2,      /* not compiled in, or not executable here */
    TARSIA_SERVE_NO_MEMORY = -4
};

/* What a row's adapter does at a site, 12 numbers; addresses as numbers, 0 where a part is absent, all 0 for nothing.
 * Thin: down [rank][in], up [out][rank], rank, bits of scale, gain [out], shift [out], inner [in], dtype of down and up;
 *       gain, shift and inner are float32.
 * Neck: down [rank][in], up [out][rank], rank, bits of scale, down_bias [rank], up_bias [out], norm [in],
 *       norm_bias [in], dtype of all these, activation (0 relu, 1 gelu, 2 silu, 3 tanh), whether it reads x, 0. */
typedef int64_t tarsia_serve_entry[12];

/* rows of n numbers of `dtype`, `stride` numbers apart */
typedef struct {
    void *at;
    int64_t stride, n, dtype;
} tarsia_serve_line;

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

int tarsia_serve_abi(void);

/* 1 when the instruction set is compiled in and this processor runs it, else 0. */
int tarsia_serve_supported(int isa);

/* Thin: y = gain * (y + scale * up (down x)) + shift; Neck: y = y + scale * (up f(down h + down_bias) + up_bias), h = x
 * or y, layer-normed (epsilon 1e-5) where it has a norm. */
int tarsia_serve_grouped(int isa, int kind, const void *x, int64_t x_stride, int64_t in, int x_dtype, void *y,
                         int64_t y_stride, int64_t out, int y_dtype, int64_t tokens, const int32_t *starts,
                         int64_t rows, const tarsia_serve_entry *entries, const tarsia4_team *team);

/* y[tokens][out] = x[tokens][in] W^T + bias[out], W bfloat16 or float32 as `dtype` says, bias float32 or NULL: the base's
 * own product for few tokens, where the processor has no instructions of bfloat16. W is read from memory once. */
int tarsia_serve_linear(int isa, const void *x, int64_t x_stride, int64_t in, int x_dtype, void *y, int64_t y_stride,
                        int64_t out, int y_dtype, int64_t tokens, const void *w, int dtype, const float *bias,
                        const tarsia4_team *team);

/* x = inner * x for tokens of rows that have one. */
int tarsia_serve_inner(int isa, void *x, int64_t x_stride, int64_t in, int x_dtype, int64_t tokens,
                       const int32_t *starts, int64_t rows, const tarsia_serve_entry *entries);

/* out[tokens][heads][dim]; q of strides q_token and q_head. Pools [blocks][block][kv_heads][dim], tables [rows][most], before
 * [rows]. window <= 0: none; softcap <= 0: none. */
int tarsia_serve_attend(int isa, const void *q, int64_t tokens, int64_t q_token, int64_t q_head, int64_t heads, int64_t dim,
                        int dtype, const void *keys, const void *values, int64_t blocks, int64_t block, int64_t kv_heads,
                        const int32_t *tables, int64_t most, const int32_t *starts, const int32_t *before,
                        int64_t rows, float scale, int64_t window, float softcap, void *out, const tarsia4_team *team);

/* k and v [tokens][kv_heads][dim] of these strides, of `size` bytes a number -> slots of the pools. */
int tarsia_serve_store(const void *k, int64_t k_token, int64_t k_head, const void *v, int64_t v_token, int64_t v_head,
                       int64_t size, void *keys, void *values, int64_t slots_in_all, int64_t kv_heads, int64_t dim,
                       const int64_t *slots, int64_t tokens);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
