/* The public functions: arguments are checked, a kernel is taken, work is cut into ranges and spread over the team. */
#define _DEFAULT_SOURCE /* mincore */

#include "tarsia4.h"

#include "kernel.h"
#include "team.h"

#include <stdlib.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

enum {
    SCALES_AT_ONCE = 1024,     /* blocks: 4 KiB of scales on the stack */
    PIECE = 256 * VECTOR_BLOCK, /* numbers of a long range that go together */
    ROWS_AHEAD = 12,           /* of a narrow tile, asked for in advance */
    PAST_CACHES = 8 << 20      /* bytes of output from which on it is no cache's */
};

int tarsia4_abi(void) { return TARSIA4_ABI; }

/* The build says by TARSIA4_HAVE_... which sources it has compiled in. */
static const tarsia4_kernel *kernel_of(int isa) {
    switch (isa) {
    case TARSIA4_PORTABLE: return &tarsia4_kernel_portable;
#if defined(TARSIA4_HAVE_AVX2)
    case TARSIA4_AVX2: return &tarsia4_kernel_avx2;
#endif
#if defined(TARSIA4_HAVE_AVX512)
    case TARSIA4_AVX512: return &tarsia4_kernel_avx512;
#endif
#if defined(TARSIA4_HAVE_AVX512_BF16)
    case TARSIA4_AVX512_BF16: return &tarsia4_kernel_avx512_bf16;
#endif
#if defined(TARSIA4_HAVE_NEON)
    case TARSIA4_NEON: return &tarsia4_kernel_neon;
#endif
    default: return NULL;
    }
}

static int executes(int isa) {
#if defined(__x86_64__)
    if (isa == TARSIA4_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == TARSIA4_AVX512)
        return executes(TARSIA4_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == TARSIA4_AVX512_BF16) return executes(TARSIA4_AVX512) && __builtin_cpu_supports("avx512bf16");
#endif
    return isa == TARSIA4_PORTABLE || isa == TARSIA4_NEON; /* every 64-bit ARM processor has NEON */
}

int tarsia4_supported(int isa) { return kernel_of(isa) && executes(isa); }

static int known_dtype(int dtype) { return dtype >= TARSIA4_FLOAT32 && dtype <= TARSIA4_FLOAT16; }

static int sound(const tarsia4_weight *w) {
    if (!w || w->rows < 0 || w->columns < 0 || w->block <= 0 || w->block % 2) return 0;
    if (w->rows && w->columns > INT64_MAX / 4 / w->rows) return 0;
    if (w->rows * w->columns == 0) return 1;
    return w->codes && w->levels && (w->absmax || (w->scale_codes && w->scale_levels && w->scale_absmax));
}

/* ---- quantise ---- */

typedef struct {
    const tarsia4_kernel *kernel;
    const void *w;
    int dtype, result;
    int64_t n, block;
    tarsia4_grid grid;
    uint8_t *codes;
    float *absmax;
} encoding;

static tarsia4_grid grid_of(const float *levels) {
    tarsia4_grid grid;
    for (int k = 0; k < 16; k++) {
        int at = k;
        for (; at > 0 && levels[grid.order[at - 1]] > levels[k]; at--) grid.order[at] = grid.order[at - 1];
        grid.order[at] = (uint8_t)k;
    }
    for (int k = 0; k < 15; k++) grid.bounds[k] = (levels[grid.order[k]] + levels[grid.order[k + 1]]) / 2.0f;
    grid.bounds[15] = bits_float(0x7f800000u);
    return grid;
}

static void encode_blocks(void *data, int64_t first, int64_t last) {
    encoding *job = data;
    int64_t whole = job->n / job->block, vector = last < whole ? last : whole;
    int result = TARSIA4_OK;
    if (job->block == VECTOR_BLOCK && vector > first) {
        result = job->kernel->encode(number_at(job->w, job->dtype, first * VECTOR_BLOCK), job->dtype, vector - first,
                                     &job->grid, job->codes + first * VECTOR_BLOCK / 2, job->absmax + first);
        first = vector;
    }
    for (int64_t b = first; b < last && result == TARSIA4_OK; b++) {
        int64_t at = b * job->block, n = job->n - at < job->block ? job->n - at : job->block;
        result = tarsia4_encode_block(job->w, job->dtype, at, n, n == job->block, &job->grid, job->codes + at / 2,
                                      job->absmax + b);
    }
    if (result != TARSIA4_OK) __atomic_store_n(&job->result, result, __ATOMIC_RELAXED);
}

int tarsia4_quantise(int isa, const void *w, int dtype, int64_t n, int64_t block, const float *levels, uint8_t *codes,
                     float *absmax, const tarsia4_team *team) {
    if (!kernel_of(isa)) return TARSIA4_BAD_ISA;
    if (!known_dtype(dtype) || n < 0 || block <= 0 || block % 2 || n > INT64_MAX - block) return TARSIA4_BAD_ARGUMENT;
    if (n == 0) return TARSIA4_OK;
    if (!w || !levels || !codes || !absmax) return TARSIA4_BAD_ARGUMENT;
    encoding job = {kernel_of(isa), w, dtype, TARSIA4_OK, n, block, grid_of(levels), codes, absmax};
    tarsia4_spread(team, (n + block - 1) / block, block, encode_blocks, &job);
    return job.result;
}

/* ---- dequantise ---- */

/* Looked up first, as bytes go through: the arithmetic is then the compiler's to do many at a time. */
static void plain_expand(const uint8_t *codes, int64_t count, const float *levels, float scale, float offset,
                         float *room) {
    for (int64_t k = 0; k < count; k++) memcpy(room + k, levels + codes[k], sizeof *room);
    for (int64_t k = 0; k < count; k++) room[k] = room[k] * scale + offset;
}

/* Nested scales of `count` blocks from `first` on, group by group of 256: one nested scale each. */
static void expand(const tarsia4_kernel *kernel, const tarsia4_weight *weight, int64_t first, int64_t count,
                   float *room) {
    while (count > 0) {
        int64_t n = 256 - first % 256;
        if (n > count) n = count;
        if (n < 8) {
            /* The few of a narrow tile: less than a call. */
            float scale = weight->scale_absmax[first / 256];
            for (int64_t k = 0; k < n; k++)
                room[k] = weight->scale_levels[weight->scale_codes[first + k]] * scale + weight->offset;
            first += n, room += n, count -= n;
            continue;
        }
        (kernel->expand ? kernel->expand : plain_expand)(weight->scale_codes + first, n, weight->scale_levels,
                                                         weight->scale_absmax[first / 256], weight->offset, room);
        first += n, room += n, count -= n;
    }
}

/* The scales of `count` whole 64-blocks from the one at number `first` on; a block of 128, 192, ... lends its scale to
 * each of them. */
static const float *scales_of(const tarsia4_kernel *kernel, const tarsia4_weight *weight, int64_t first, int64_t count,
                              float *room) {
    if (weight->block == VECTOR_BLOCK && weight->absmax) return weight->absmax + first / VECTOR_BLOCK;
    if (weight->block == VECTOR_BLOCK) expand(kernel, weight, first / VECTOR_BLOCK, count, room);
    else
        for (int64_t k = 0; k < count; k++) room[k] = block_scale(weight, (first + k * VECTOR_BLOCK) / weight->block);
    return room;
}

/* Numbers first..last-1 of the weight: whole 64-blocks by the kernel (`past` the caches where `out` allows it), the
 * ends in plain C. */
static void decode_range(const tarsia4_kernel *kernel, const tarsia4_weight *weight, int64_t first, int64_t last,
                         void *out, int dtype, int past) {
    float room[SCALES_AT_ONCE];
    int64_t size = number_size(dtype), at = (first + VECTOR_BLOCK - 1) / VECTOR_BLOCK * VECTOR_BLOCK;
    if (weight->block % VECTOR_BLOCK || at + VECTOR_BLOCK > last) {
        tarsia4_decode_span(weight, first, last, out, dtype);
        return;
    }
    tarsia4_decode_span(weight, first, at, out, dtype);
    while (at + VECTOR_BLOCK <= last) {
        int64_t blocks = (last - at) / VECTOR_BLOCK;
        if (blocks > SCALES_AT_ONCE) blocks = SCALES_AT_ONCE;
        char *to = (char *)out + (at - first) * size;
        const float *scales = scales_of(kernel, weight, at, blocks, room);
        int by = past && kernel->decode_past && (uintptr_t)to % 64 == 0;
        (by ? kernel->decode_past : kernel->decode)(weight->codes + at / 2, scales, blocks, weight->levels, to, dtype);
        at += blocks * VECTOR_BLOCK;
    }
    tarsia4_decode_span(weight, at, last, (char *)out + (at - first) * size, dtype);
}

/* Range i is `width` numbers from start + i * pitch on, of which those before `begin` and from `limit` on fall away;
 * number start + i * pitch belongs to out + i * stride - (begin - start). */
typedef struct {
    const tarsia4_kernel *kernel;
    const tarsia4_weight *weight;
    int64_t start, pitch, width, begin, limit, stride;
    char *out;
    int dtype, past;
} decoding;

/* A narrow tile jumps from row to row, which no processor foresees: what a later row needs is asked for in time. */
static void ask_for(const tarsia4_weight *weight, int64_t first, int64_t width) {
    int64_t block = first / VECTOR_BLOCK;
    for (int64_t at = 0; at < width; at += PAIR) __builtin_prefetch(weight->codes + (first + at) / 2);
    if (weight->block == VECTOR_BLOCK)
        __builtin_prefetch(weight->absmax ? (const char *)(weight->absmax + block)
                                          : (const char *)(weight->scale_codes + block));
}

static void decode_ranges(void *data, int64_t first, int64_t last) {
    const decoding *job = data;
    for (int64_t i = first; i < last; i++) {
        int64_t at = job->start + i * job->pitch, end = at + job->width;
        if (job->width < job->pitch && i + ROWS_AHEAD < last)
            ask_for(job->weight, at + ROWS_AHEAD * job->pitch, job->width);
        int64_t to = i * job->stride - (job->begin - job->start), late = at < job->begin ? job->begin - at : 0;
        decode_range(job->kernel, job->weight, at + late, end < job->limit ? end : job->limit,
                     job->out + (to + late) * number_size(job->dtype), job->dtype, job->past);
    }
#if defined(__x86_64__)
    /* Stores past the caches are in no order: they are done before another thread is told so. */
    if (job->past) __builtin_ia32_sfence();
#endif
}

/* Whether `out` is so long that no cache keeps it: then reading it in first would be in vain. Not so where its pages
 * are still to be made (the one in the middle stands for all): the system writes zeros there, through the caches. */
static int past_caches(const char *out, int64_t bytes) {
    if (bytes < PAST_CACHES) return 0;
#if defined(__linux__)
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), middle = (uintptr_t)(out + bytes / 2) / page * page;
    unsigned char there = 0;
    return mincore((void *)middle, 1, &there) == 0 && (there & 1);
#else
    (void)out;
    return 1;
#endif
}

int tarsia4_dequantise(int isa, const tarsia4_weight *weight, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                       void *out, int dtype, int64_t stride, const tarsia4_team *team) {
    if (!kernel_of(isa)) return TARSIA4_BAD_ISA;
    if (!known_dtype(dtype) || !sound(weight)) return TARSIA4_BAD_ARGUMENT;
    if (row0 < 0 || row1 < row0 || row1 > weight->rows) return TARSIA4_BAD_ARGUMENT;
    if (col0 < 0 || col1 < col0 || col1 > weight->columns || stride < col1 - col0) return TARSIA4_BAD_ARGUMENT;
    int64_t rows = row1 - row0, columns = weight->columns, width = col1 - col0;
    int64_t begin = row0 * columns + col0, limit = row1 * columns;
    if (rows == 0 || width == 0) return TARSIA4_OK;
    if (!out) return TARSIA4_BAD_ARGUMENT;
    decoding job = {kernel_of(isa), weight, begin, columns, width, begin, limit, stride, out, dtype,
                    past_caches(out, rows * width * number_size(dtype))};
    if (width == columns && stride == columns) {
        /* One long range: cut at the edges of blocks, so that a single long row is shared out too and rows that are no
         * whole number of blocks cost no more. */
        job.start = begin / VECTOR_BLOCK * VECTOR_BLOCK;
        job.pitch = job.width = job.stride = PIECE;
        rows = (limit - job.start + PIECE - 1) / PIECE;
    }
    tarsia4_spread(team, rows, job.width, decode_ranges, &job);
    return TARSIA4_OK;
}

/* ---- few rows ---- */

typedef struct {
    const tarsia4_kernel *kernel;
    const tarsia4_weight *weight;
    const char *x; /* arranged, `step` bytes from pair to pair; or plain float32, `step` bytes from row to row */
    int64_t step, m;
    const void *bias;
    void *out;
    int dtype, packed;
} product;

/* rows weights of the weight from `row` on, times rows i..i+m-1 of x, added to sums. */
static void packed_rows(const product *job, int64_t row, int64_t rows, int64_t i, int64_t m, float *sums) {
    const tarsia4_weight *weight = job->weight;
    float room[SCALES_AT_ONCE];
    int64_t pitch = weight->columns / VECTOR_BLOCK;
    for (int64_t done = 0; done < pitch; done += SCALES_AT_ONCE) {
        int64_t at = row * weight->columns + done * VECTOR_BLOCK, blocks = pitch - done;
        if (blocks > SCALES_AT_ONCE) blocks = SCALES_AT_ONCE; /* one row then: see strip_of */
        tarsia4_strip strip = {
            .codes = weight->codes + at / 2,
            .scales = scales_of(job->kernel, weight, at, rows * blocks, room),
            .levels = weight->levels,
            .blocks = blocks,
            .pitch = pitch,
            .rows = rows,
            .x = job->x + done / 2 * job->step + i * job->kernel->pair,
            .step = job->step,
            .m = m,
            .sums = sums,
        };
        job->kernel->multiply(&strip);
    }
}

static void decoded_rows(const product *job, int64_t row, int64_t rows, int64_t i, int64_t m, float *sums) {
    float piece[1024];
    int64_t columns = job->weight->columns, stride = job->step / (int64_t)sizeof(float);
    const float *x = (const float *)job->x + i * stride;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t at = 0; at < columns; at += 1024) {
            int64_t n = columns - at < 1024 ? columns - at : 1024, start = (row + r) * columns + at;
            decode_range(job->kernel, job->weight, start, start + n, piece, TARSIA4_FLOAT32, 0);
            job->kernel->dot(piece, x + at, stride, n, m, sums + r * ROWS_AT_ONCE);
        }
}

/* How many rows of weights go at once: as many as their scales and sums have room for. */
static int64_t strip_of(const tarsia4_weight *weight) {
    int64_t rows = SCALES_AT_ONCE / (weight->columns / VECTOR_BLOCK + 1);
    return rows < 1 ? 1 : rows < STRIP ? rows : STRIP;
}

static void product_rows(void *data, int64_t first, int64_t last) {
    const product *job = data;
    int64_t all = job->weight->rows, most = strip_of(job->weight);
    for (int64_t row = first, rows; row < last; row += rows) {
        rows = last - row < most ? last - row : most;
        for (int64_t i = 0; i < job->m; i += ROWS_AT_ONCE) {
            int64_t m = job->m - i < ROWS_AT_ONCE ? job->m - i : ROWS_AT_ONCE;
            float sums[STRIP * ROWS_AT_ONCE] = {0};
            (job->packed ? packed_rows : decoded_rows)(job, row, rows, i, m, sums);
            for (int64_t r = 0; r < rows; r++) {
                float bias = job->bias ? load_number(job->bias, job->dtype, row + r) : 0.0f;
                for (int64_t k = 0; k < m; k++)
                    store_number(job->out, job->dtype, (i + k) * all + row + r, sums[r * ROWS_AT_ONCE + k] + bias);
            }
        }
    }
}

/* x once per call into the form that the kernel reads it in; NULL without memory. */
static char *prepared(product *job, const void *x) {
    int64_t columns = job->weight->columns, pairs = (columns + PAIR - 1) / PAIR, pair = job->kernel->pair;
    job->step = job->packed ? job->m * pair : (columns + 15) / 16 * 64;
    char *room = aligned_alloc(64, (size_t)(job->packed ? pairs * job->step : job->m * job->step));
    for (int64_t i = 0; room && columns && i < job->m; i++) {
        const void *from = number_at(x, job->dtype, i * columns);
        if (job->packed) job->kernel->arrange(from, job->dtype, columns, room + i * pair, job->step);
        else widen(from, job->dtype, 0, columns, (float *)(room + i * job->step));
    }
    return room;
}

int tarsia4_rows(int isa, const tarsia4_weight *weight, const void *x, int dtype, int64_t m, const void *bias,
                 void *out, const tarsia4_team *team) {
    if (!kernel_of(isa)) return TARSIA4_BAD_ISA;
    if (!known_dtype(dtype) || !sound(weight) || m < 0) return TARSIA4_BAD_ARGUMENT;
    if (m == 0 || weight->rows == 0) return TARSIA4_OK;
    if (!out || (!x && weight->columns)) return TARSIA4_BAD_ARGUMENT;
    /* The BF16 instruction multiplies bfloat16 alone. */
    if (isa == TARSIA4_AVX512_BF16 && dtype != TARSIA4_BFLOAT16) isa = TARSIA4_AVX512;
    product job = {.kernel = kernel_of(isa), .weight = weight, .m = m, .bias = bias, .out = out, .dtype = dtype};
    job.packed = job.kernel->multiply && weight->columns % VECTOR_BLOCK == 0 && weight->block % VECTOR_BLOCK == 0;
    char *room = prepared(&job, x);
    if (!room && weight->columns) return TARSIA4_NO_MEMORY;
    job.x = room;
    tarsia4_spread(team, weight->rows, weight->columns * m, product_rows, &job);
    free(room);
    return TARSIA4_OK;
}
