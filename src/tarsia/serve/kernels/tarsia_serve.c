/* The public functions but attention: arguments are checked, steps are taken, work is spread over the team. */
#include "tarsia_serve.h"

#include "steps.h"
#include "team.h"

#include <stdlib.h>

int tarsia_serve_abi(void) { return TARSIA_SERVE_ABI; }

/* The build says by TARSIA_SERVE_HAVE_... which sources it has compiled in. */
const tarsia_serve_steps *tarsia_serve_steps_of(int isa) {
    switch (isa) {
    case TARSIA_SERVE_PORTABLE: return &tarsia_serve_portable;
#if defined(TARSIA_SERVE_HAVE_AVX2)
    case TARSIA_SERVE_AVX2: return &tarsia_serve_avx2;
#endif
#if defined(TARSIA_SERVE_HAVE_AVX512)
    case TARSIA_SERVE_AVX512: return &tarsia_serve_avx512;
#endif
    default: return NULL;
    }
}

static int executes(int isa) {
#if defined(__x86_64__)
    if (isa == TARSIA_SERVE_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == TARSIA_SERVE_AVX512)
        return executes(TARSIA_SERVE_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == TARSIA_SERVE_PORTABLE;
}

int tarsia_serve_supported(int isa) { return tarsia_serve_steps_of(isa) && executes(isa); }

static int sound(const tarsia_serve_line *line) {
    return line->n >= 0 && line->stride >= line->n && (line->dtype == TARSIA4_FLOAT32 || line->dtype == TARSIA4_BFLOAT16);
}

static int within(const int32_t *starts, int64_t rows, int64_t tokens) {
    for (int64_t row = 0; row < rows; row++)
        if (starts[row] < 0 || starts[row + 1] < starts[row]) return 0;
    return !rows || starts[rows] <= tokens;
}

static const void *address(int64_t number) { return (const void *)(intptr_t)number; }

/* The adapter of an entry; 0 where the entry is none that there can be. */
static int adapter_of(const int64_t *entry, int kind, tarsia_serve_block *b) {
    const int neck = kind == TARSIA_SERVE_NECK;
    const int64_t dtype = entry[neck ? 8 : 7];
    b->down = address(entry[0]), b->up = address(entry[1]), b->rank = entry[2];
    b->scale = bits_float((uint32_t)entry[3]);
    b->neck = neck, b->halves = dtype == TARSIA4_BFLOAT16;
    if (neck) {
        b->down_bias = address(entry[4]), b->up_bias = address(entry[5]);
        b->norm = address(entry[6]), b->norm_bias = address(entry[7]);
        b->activation = (int)entry[9], b->of_input = (int)entry[10];
        if (!b->of_input) b->in = b->out;
        if (b->rank <= 0 || b->activation < 0 || b->activation > 3 || !b->norm != !b->norm_bias) return 0;
    } else b->gain = address(entry[4]), b->shift = address(entry[5]);
    if (dtype != TARSIA4_FLOAT32 && dtype != TARSIA4_BFLOAT16) return 0;
    return b->rank >= 0 && (!b->rank || (b->down && b->up));
}

static int empty(const int64_t *entry) {
    int64_t any = 0;
    for (int i = 0; i < 12; i++) any |= entry[i];
    return !any;
}

/* At most TOKENS tokens of one row. */
typedef struct {
    int32_t row, first, count;
} unit;

typedef struct {
    const tarsia_serve_steps *steps;
    int kind, result;
    tarsia_serve_line x, y;
    const tarsia_serve_entry *entries;
    const unit *units;
    int64_t rank, pieces; /* the highest rank; into how many parts a unit's products are cut */
    float *arranged, *hidden;
} job;

static tarsia_serve_block block_of(const job *all, const unit *u) {
    tarsia_serve_block b = {.in = all->x.n, .out = all->y.n, .x_dtype = (int)all->x.dtype, .y_dtype = (int)all->y.dtype};
    adapter_of(all->entries[u->row], all->kind, &b);
    b.x = number_at(all->x.at, b.x_dtype, u->first * all->x.stride);
    b.y = (char *)all->y.at + u->first * all->y.stride * number_size(b.y_dtype);
    b.x_stride = all->x.stride, b.y_stride = all->y.stride, b.count = u->count;
    return b;
}

static int64_t arranged_room(const job *all, int64_t count) {
    return (count + 1) * padded(all->x.n > all->y.n ? all->x.n : all->y.n);
}

/* Whole units, each with both of its products: nobody waits for anybody. */
static void whole(void *data, int64_t first, int64_t last) {
    job *all = data;
    int64_t most = 0;
    for (int64_t i = first; i < last; i++) most = all->units[i].count > most ? all->units[i].count : most;
    float *room = malloc((size_t)(arranged_room(all, most) + most * all->rank) * sizeof *room);
    if (!room) {
        __atomic_store_n(&all->result, TARSIA_SERVE_NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t i = first; i < last; i++) {
        tarsia_serve_block b = block_of(all, all->units + i);
        b.arranged = room, b.hidden = room + arranged_room(all, most);
        if (i + 1 < last) b.next = address(all->entries[all->units[i + 1].row][0]);
        if (b.rank) all->steps->arrange(&b), all->steps->down(&b, 0, b.rank);
        all->steps->up(&b, 0, b.out);
    }
    free(room);
}

/* Where units are fewer than threads: first the slices of rank, then those of outputs. */
static void slices(void *data, int64_t first, int64_t last, int up) {
    job *all = data;
    for (int64_t i = first; i < last; i++) {
        const int64_t number = i / all->pieces, part = i % all->pieces;
        tarsia_serve_block b = block_of(all, all->units + number);
        b.arranged = all->arranged + number * arranged_room(all, TOKENS);
        b.hidden = all->hidden + number * TOKENS * all->rank;
        const int64_t of = up ? (b.out + 63) / 64 : b.rank, step = up ? 64 : 1;
        int64_t from = of * part / all->pieces * step, to = of * (part + 1) / all->pieces * step;
        if (up) all->steps->up(&b, from, to < b.out ? to : b.out);
        else if (to > from) all->steps->down(&b, from, to);
    }
}

static void down_slices(void *data, int64_t first, int64_t last) { slices(data, first, last, 0); }
static void up_slices(void *data, int64_t first, int64_t last) { slices(data, first, last, 1); }

static int sliced(job *all, int64_t count, int64_t cost, const tarsia4_team *team) {
    all->pieces = 2 * team->threads;
    all->arranged = malloc((size_t)(count * (arranged_room(all, TOKENS) + TOKENS * all->rank)) * sizeof(float));
    if (!all->arranged) return TARSIA_SERVE_NO_MEMORY;
    all->hidden = all->arranged + count * arranged_room(all, TOKENS);
    for (int64_t i = 0; i < count; i++) {
        tarsia_serve_block b = block_of(all, all->units + i);
        b.arranged = all->arranged + i * arranged_room(all, TOKENS);
        if (b.rank) all->steps->arrange(&b);
    }
    tarsia4_spread(team, count * all->pieces, cost / 2 / all->pieces + 1, down_slices, all);
    tarsia4_spread(team, count * all->pieces, cost / 2 / all->pieces + 1, up_slices, all);
    free(all->arranged);
    return TARSIA_SERVE_OK;
}

/* The units of all rows that have an adapter, or -1 where an entry is wrong. */
static int64_t units_of(job *all, const int32_t *starts, int64_t rows, unit *units) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t *entry = all->entries[row];
        if (starts[row] == starts[row + 1] || empty(entry)) continue;
        tarsia_serve_block b = {.in = all->x.n, .out = all->y.n};
        if (!adapter_of(entry, all->kind, &b)) return -1;
        if (!b.rank && !b.gain && !b.shift) continue; /* an inner alone */
        if (b.rank > all->rank) all->rank = b.rank;
        for (int32_t first = starts[row]; first < starts[row + 1]; first += TOKENS, count++) {
            const int32_t left = starts[row + 1] - first;
            if (units) units[count] = (unit){(int32_t)row, first, left < TOKENS ? left : TOKENS};
        }
    }
    return count;
}

enum { SLICES_WORTH = 1 << 20 };

int tarsia_serve_grouped(int isa, int kind, const void *x, int64_t x_stride, int64_t in, int x_dtype, void *y,
                         int64_t y_stride, int64_t out, int y_dtype, int64_t tokens, const int32_t *starts,
                         int64_t rows, const tarsia_serve_entry *entries, const tarsia4_team *team) {
    job all = {.steps = tarsia_serve_steps_of(isa), .kind = kind, .result = TARSIA_SERVE_OK, .entries = entries};
    if (!all.steps) return TARSIA_SERVE_BAD_ISA;
    all.x = (tarsia_serve_line){(void *)(intptr_t)x, x_stride, in, x_dtype};
    all.y = (tarsia_serve_line){y, y_stride, out, y_dtype};
    if ((kind != TARSIA_SERVE_THIN && kind != TARSIA_SERVE_NECK) || !sound(&all.x) || !sound(&all.y))
        return TARSIA_SERVE_BAD_ARGUMENT;
    if (rows < 0 || (rows && (!starts || !entries)) || !within(starts, rows, tokens)) return TARSIA_SERVE_BAD_ARGUMENT;
    int64_t count = units_of(&all, starts, rows, NULL);
    if (count <= 0) return count ? TARSIA_SERVE_BAD_ARGUMENT : TARSIA_SERVE_OK;
    if (!x || !y || !in || !out) return TARSIA_SERVE_BAD_ARGUMENT;
    unit few[64], *units = count <= 64 ? few : malloc((size_t)count * sizeof *units);
    if (!units) return TARSIA_SERVE_NO_MEMORY;
    units_of(&all, starts, rows, units);
    all.units = units;
    const int64_t cost = (in + out) * (all.rank + 1) * units[0].count;
    if (team && team->parallel && count < team->threads && cost > SLICES_WORTH)
        all.result = sliced(&all, count, cost, team);
    else tarsia4_spread(team, count, cost, whole, &all);
    if (units != few) free(units);
    return all.result;
}

enum { OUTPUTS = 64 }; /* whose rows of the weight stay in the second cache while all tokens go by */

typedef struct {
    const tarsia_serve_steps *steps;
    tarsia_serve_line x, y;
    const char *w;
    int dtype;
    const float *bias;
    int64_t tokens;
    float *arranged;
} dense;

static tarsia_serve_block tokens_of(const dense *all, int64_t first) {
    const int64_t left = all->tokens - first;
    tarsia_serve_block b = {.in = all->x.n, .x_stride = all->x.stride, .x_dtype = (int)all->x.dtype};
    b.count = left < TOKENS ? left : TOKENS, b.halves = all->dtype == TARSIA4_BFLOAT16;
    b.x = number_at(all->x.at, b.x_dtype, first * all->x.stride);
    b.arranged = all->arranged + first * padded(all->x.n);
    return b;
}

static void dense_slices(void *data, int64_t first, int64_t last) {
    const dense *all = data;
    float sums[TOKENS * OUTPUTS];
    for (int64_t i = first; i < last; i++) {
        const int64_t o = i * OUTPUTS, n = all->y.n - o < OUTPUTS ? all->y.n - o : OUTPUTS;
        for (int64_t from = 0; from < all->tokens; from += TOKENS) {
            tarsia_serve_block b = tokens_of(all, from);
            b.down = number_at(all->w, all->dtype, o * all->x.n), b.rank = n, b.hidden = sums;
            all->steps->down(&b, 0, n);
            for (int64_t t = 0; t < b.count; t++)
                for (int64_t r = 0; r < n; r++)
                    store_number(all->y.at, (int)all->y.dtype, (from + t) * all->y.stride + o + r,
                                 sums[t * n + r] + (all->bias ? all->bias[o + r] : 0.0f));
        }
    }
}

int tarsia_serve_linear(int isa, const void *x, int64_t x_stride, int64_t in, int x_dtype, void *y, int64_t y_stride,
                        int64_t out, int y_dtype, int64_t tokens, const void *w, int dtype, const float *bias,
                        const tarsia4_team *team) {
    dense all = {.steps = tarsia_serve_steps_of(isa), .w = w, .dtype = dtype, .bias = bias, .tokens = tokens};
    if (!all.steps) return TARSIA_SERVE_BAD_ISA;
    all.x = (tarsia_serve_line){(void *)(intptr_t)x, x_stride, in, x_dtype};
    all.y = (tarsia_serve_line){y, y_stride, out, y_dtype};
    if (!sound(&all.x) || !sound(&all.y) || tokens < 0 || (dtype != TARSIA4_FLOAT32 && dtype != TARSIA4_BFLOAT16))
        return TARSIA_SERVE_BAD_ARGUMENT;
    if (!tokens || !out) return TARSIA_SERVE_OK;
    if (!x || !y || !w || !in) return TARSIA_SERVE_BAD_ARGUMENT;
    all.arranged = malloc((size_t)((tokens + 1) * padded(in)) * sizeof *all.arranged);
    if (!all.arranged) return TARSIA_SERVE_NO_MEMORY;
    for (int64_t first = 0; first < tokens; first += TOKENS) {
        tarsia_serve_block b = tokens_of(&all, first);
        all.steps->arrange(&b);
    }
    tarsia4_spread(team, (out + OUTPUTS - 1) / OUTPUTS, OUTPUTS * in * (1 + tokens / 4), dense_slices, &all);
    free(all.arranged);
    return TARSIA_SERVE_OK;
}

int tarsia_serve_inner(int isa, void *x, int64_t x_stride, int64_t in, int x_dtype, int64_t tokens,
                       const int32_t *starts, int64_t rows, const tarsia_serve_entry *entries) {
    const tarsia_serve_line line = {x, x_stride, in, x_dtype};
    if (!tarsia_serve_steps_of(isa)) return TARSIA_SERVE_BAD_ISA;
    if (!sound(&line) || rows < 0 || (rows && (!starts || !entries))) return TARSIA_SERVE_BAD_ARGUMENT;
    if (!within(starts, rows, tokens)) return TARSIA_SERVE_BAD_ARGUMENT;
    for (int64_t row = 0; row < rows; row++) {
        const float *by = address(entries[row][6]);
        for (int64_t t = starts[row]; by && t < starts[row + 1]; t++) {
            if (x_dtype == TARSIA4_FLOAT32) {
                float *at = (float *)x + t * x_stride;
                for (int64_t i = 0; i < in; i++) at[i] *= by[i];
            } else {
                uint16_t *at = (uint16_t *)x + t * x_stride;
                for (int64_t i = 0; i < in; i++) at[i] = to_bfloat16(from_bfloat16(at[i]) * by[i]);
            }
        }
    }
    return TARSIA_SERVE_OK;
}

int tarsia_serve_store(const void *k, int64_t k_token, int64_t k_head, const void *v, int64_t v_token, int64_t v_head,
                       int64_t size, void *keys, void *values, int64_t slots_in_all, int64_t kv_heads, int64_t dim,
                       const int64_t *slots, int64_t tokens) {
    const size_t length = (size_t)(dim * size);
    if (size <= 0 || kv_heads < 0 || dim < 0 || tokens < 0) return TARSIA_SERVE_BAD_ARGUMENT;
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] < 0 || slots[t] >= slots_in_all) return TARSIA_SERVE_BAD_ARGUMENT;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t to = (slots[t] * kv_heads + h) * dim * size;
            memcpy((char *)keys + to, (const char *)k + (t * k_token + h * k_head) * size, length);
            memcpy((char *)values + to, (const char *)v + (t * v_token + h * v_head) * size, length);
        }
    return TARSIA_SERVE_OK;
}
