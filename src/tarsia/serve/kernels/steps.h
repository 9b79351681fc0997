/* What one instruction set provides. Threads, units of work and argument checks are tarsia_serve.c's and attend.c's. */
#ifndef TARSIA_SERVE_STEPS_H
#define TARSIA_SERVE_STEPS_H

#include "numbers.h"
#include "tarsia_serve.h"

#include <stddef.h>

/* Tokens of one row that go through an adapter together; positions of the cache that attention takes at a time. */
enum { TOKENS = 16, POSITIONS = 64 };

/* Both products of one adapter for `count` <= TOKENS tokens that begin at x and y. */
typedef struct {
    const void *down, *up, *next; /* next: what is read after up, or NULL */
    int64_t rank, in, out;
    int halves; /* whether down and up are bfloat16 */
    float scale;
    const float *gain, *shift;         /* thin */
    const void *down_bias, *up_bias;   /* neck, of down's dtype as norm and norm_bias are */
    const void *norm, *norm_bias;
    int neck, activation, of_input;
    const void *x;
    void *y;
    int64_t x_stride, y_stride, count;
    int x_dtype, y_dtype;
    float *arranged; /* count rows of `padded(in)` numbers */
    float *hidden;   /* count rows of rank numbers */
} tarsia_serve_block;

/* Queries of one row and one head of the cache: `tokens` tokens of `group` heads each, the first at position `first`. */
typedef struct {
    const void *q;
    int64_t q_token, q_head, out_token;
    void *out;
    const void *keys, *values;
    const int32_t *table;
    int64_t block, position; /* numbers from one position of a pool to the next */
    int64_t tokens, group, dim, first, window;
    int dtype;
    float scale, softcap;
    float *room; /* `tarsia_serve_room` numbers */
} tarsia_serve_queries;

typedef struct {
    void (*arrange)(const tarsia_serve_block *block);
    void (*down)(const tarsia_serve_block *block, int64_t first, int64_t last); /* ranks */
    void (*up)(const tarsia_serve_block *block, int64_t first, int64_t last);   /* outputs; first a multiple of 64 */
    void (*attend)(const tarsia_serve_queries *queries);
} tarsia_serve_steps;

extern const tarsia_serve_steps tarsia_serve_portable, tarsia_serve_avx2, tarsia_serve_avx512;

/* Up to a multiple of what two registers hold, whatever the set. */
static inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

static inline int64_t tarsia_serve_room(int64_t rows, int64_t dim) {
    return padded(dim) * (2 * rows + 2 * POSITIONS) + rows * (POSITIONS + 32) + 2 * padded(rows);
}

/* The steps of an instruction set that is compiled in, or NULL. */
const tarsia_serve_steps *tarsia_serve_steps_of(int isa);

#endif
