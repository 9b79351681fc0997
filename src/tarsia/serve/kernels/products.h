/* Both products of an adapter. Each number of `hidden` and of y is summed in the same order however many tokens there
 * are beside it. */

/* n numbers to float32. `pairs`: of every 2 * LANES first those at even places, then those at odd ones, as registers of
 * bfloat16 come apart. Filled up with zeros to padded(n). */
static void lay(const void *from, int dtype, int64_t n, int pairs, float *to) {
    float room[2 * LANES];
    const int64_t whole = n / (2 * LANES) * (2 * LANES);
    for (int64_t i = n; i < padded(n); i++) to[i] = 0.0f;
    if (!pairs) {
        widen(from, dtype, 0, n, to);
        return;
    }
    if (dtype == TARSIA4_BFLOAT16)
        for (int64_t i = 0; i < whole; i += 2 * LANES) {
            words both = bits_at((const uint16_t *)from + i);
            put(to + i, evens(both)), put(to + i + LANES, odds(both));
        }
    else
        for (int64_t i = 0; i < whole; i += 2 * LANES) {
            const float *here = (const float *)from + i;
            for (int k = 0; k < LANES; k++) to[i + k] = here[2 * k], to[i + LANES + k] = here[2 * k + 1];
        }
    if (whole == n) return;
    memset(room, 0, sizeof room);
    widen(from, dtype, whole, n - whole, room);
    for (int k = 0; k < LANES; k++) to[whole + k] = room[2 * k], to[whole + LANES + k] = room[2 * k + 1];
}

/* (h - mean) / sqrt(variance + 1e-5) * norm + norm_bias, over h itself. */
static void normed(float *h, int64_t n, const void *norm, const void *norm_bias, int dtype) {
    double sum = 0.0, squares = 0.0;
    for (int64_t i = 0; i < n; i++) sum += h[i];
    double mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (h[i] - mean) * (h[i] - mean);
    float by = (float)(1.0 / sqrt(squares / (double)n + 1e-5)), middle = (float)mean;
    for (int64_t i = 0; i < n; i++) h[i] = (h[i] - middle) * by * load_number(norm, dtype, i) + load_number(norm_bias, dtype, i);
}

static void arrange(const tarsia_serve_block *b) {
    const int own = b->neck && !b->of_input, dtype = own ? b->y_dtype : b->x_dtype;
    const int weights = b->halves ? TARSIA4_BFLOAT16 : TARSIA4_FLOAT32;
    const char *from = own ? b->y : b->x;
    const int64_t step = (own ? b->y_stride : b->x_stride) * number_size(dtype), pitch = padded(b->in);
    for (int64_t t = 0; t < b->count; t++) {
        float *to = b->arranged + t * pitch;
        if (!b->norm) {
            lay(from + t * step, dtype, b->in, b->halves, to);
            continue;
        }
        float *plain = b->arranged + b->count * pitch; /* one row more */
        lay(from + t * step, dtype, b->in, 0, plain);
        normed(plain, b->in, b->norm, b->norm_bias, weights);
        lay(plain, TARSIA4_FLOAT32, b->in, b->halves, to);
    }
}

/* 2 * LANES weights; of the last ones `n` are there. */
INLINE void weights_at(const void *w, int halves, int64_t i, int64_t n, numbers *first, numbers *last) {
    if (halves) {
        const uint16_t *at = (const uint16_t *)w + i;
        words both = n >= 2 * LANES ? bits_at(at) : SOME(at, 2 * n);
        *first = evens(both), *last = odds(both);
        return;
    }
    const float *at = (const float *)w + i;
    *first = n >= LANES ? load(at) : (numbers)SOME(at, 4 * n);
    if (n >= 2 * LANES) *last = load(at + LANES);
    else *last = n > LANES ? (numbers)SOME(at + LANES, 4 * (n - LANES)) : (numbers){0};
}

/* Ask memory for `bytes` bytes AHEAD of `at`; what lies beyond `end` goes on at `next`, the matrix that is read then. */
INLINE void foresee(const char *at, int64_t bytes, const char *end, const char *next) {
    for (int64_t i = AHEAD; i < AHEAD + bytes; i += 64) __builtin_prefetch(at + i < end ? at + i : next + (at + i - end));
}

/* `ranks` rows of down from `rank` on by `tokens` tokens from `t` on; all constants where this is called. */
INLINE void dots(const tarsia_serve_block *b, int64_t rank, int64_t t, int halves, int ranks, int tokens) {
    const int64_t n = b->in, pitch = padded(n), size = halves ? 2 : 4;
    const char *w = (const char *)b->down + rank * n * size, *end = (const char *)b->down + b->rank * n * size;
    const float *x = b->arranged + t * pitch;
    numbers sums[8][2] = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        numbers first[2], last[2];
        for (int r = 0; r < ranks; r++) {
            weights_at(w + r * n * size, halves, i, 2 * LANES, first + r, last + r);
            foresee(w + (r * n + i) * size, 2 * LANES * size, end, b->up ? b->up : end);
        }
        for (int k = 0; k < tokens; k++) {
            numbers a = load(x + k * pitch + i), c = load(x + k * pitch + i + LANES);
            for (int r = 0; r < ranks; r++) {
                sums[k * ranks + r][0] = FUSED(a, first[r], sums[k * ranks + r][0]);
                sums[k * ranks + r][1] = FUSED(c, last[r], sums[k * ranks + r][1]);
            }
        }
    }
    for (int r = 0; r < ranks && i < n; r++) {
        numbers first, last;
        weights_at(w + r * n * size, halves, i, n - i, &first, &last);
        for (int k = 0; k < tokens; k++) {
            sums[k * ranks + r][0] = FUSED(load(x + k * pitch + i), first, sums[k * ranks + r][0]);
            sums[k * ranks + r][1] = FUSED(load(x + k * pitch + i + LANES), last, sums[k * ranks + r][1]);
        }
    }
    for (int k = 0; k < tokens; k++)
        for (int r = 0; r < ranks; r++)
            b->hidden[(t + k) * b->rank + rank + r] = SUM(sums[k * ranks + r][0] + sums[k * ranks + r][1]);
}

/* Rows of down in the outer loop: each comes from memory once, and tokens lie in a nearer cache. */
INLINE void down_as(const tarsia_serve_block *b, int64_t first, int64_t last, int halves) {
    const int64_t fours = b->count / 4 * 4;
    int64_t r = first;
    for (; r + 2 <= last && fours; r += 2) {
        for (int64_t t = 0; t < fours; t += 4) dots(b, r, t, halves, 2, 4);
        for (int64_t t = fours; t < b->count; t++)
            for (int i = 0; i < 2; i++) dots(b, r + i, t, halves, 1, 1);
    }
    for (; r < last; r++) {
        for (int64_t t = 0; t < fours; t += 4) dots(b, r, t, halves, 1, 4);
        for (int64_t t = fours; t < b->count; t++) dots(b, r, t, halves, 1, 1);
    }
}

static float activated(float x, int activation) {
    switch (activation) {
    case 0: return x > 0.0f ? x : x != x ? x : 0.0f;
    case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f));
    case 2: return x / (1.0f + expf(-x));
    default: return tanhf(x);
    }
}

static void down(const tarsia_serve_block *b, int64_t first, int64_t last) {
    if (b->halves) down_as(b, first, last, 1);
    else down_as(b, first, last, 0);
    if (!b->neck) return;
    const int weights = b->halves ? TARSIA4_BFLOAT16 : TARSIA4_FLOAT32;
    for (int64_t t = 0; t < b->count; t++)
        for (int64_t r = first; r < last; r++) {
            float *h = b->hidden + t * b->rank + r;
            *h = activated(*h + (b->down_bias ? load_number(b->down_bias, weights, r) : 0.0f), b->activation);
        }
}

/* Ranks k..k+n-1 of `rows` <= LANES rows of up from row o on, rank by rank: number i of a register is row o + i's. */
INLINE void columns_of_halves(const tarsia_serve_block *b, int64_t o, int rows, int64_t k, int n, numbers *to) {
    const uint16_t *from = (const uint16_t *)b->up + o * b->rank + k;
    words v[LANES];
    if (n <= LANES) {
        for (int j = 0; j < HALF; j++) {
            const uint16_t *p = from + j * b->rank, *q = p + HALF * b->rank;
            if (n == LANES && rows == LANES) v[j] = TWO(p, q);
            else {
                uint16_t both[2 * LANES] = {0};
                for (int i = 0; i < n && j < rows; i++) both[i] = p[i];
                for (int i = 0; i < n && j + HALF < rows; i++) both[LANES + i] = q[i];
                v[j] = bits_at(both);
            }
        }
        turn(v, HALF);
        for (int j = 0; j < HALF; j++) to[2 * j] = evens(v[j]), to[2 * j + 1] = odds(v[j]);
        return;
    }
    for (int j = 0; j < LANES; j++) {
        if (j >= rows) v[j] = (words){0};
        else v[j] = n == 2 * LANES ? bits_at(from + j * b->rank) : SOME(from + j * b->rank, 2 * n);
    }
    turn(v, LANES);
    for (int j = 0; j < LANES; j++) to[2 * j] = evens(v[j]), to[2 * j + 1] = odds(v[j]);
}

INLINE void columns(const tarsia_serve_block *b, int64_t o, int rows, int64_t k, int n, numbers *to) {
    const float *from = (const float *)b->up + o * b->rank + k;
    words v[LANES];
    for (int j = 0; j < LANES; j++) {
        if (j >= rows) v[j] = (words){0};
        else v[j] = n == LANES ? bits_at(from + j * b->rank) : SOME(from + j * b->rank, 4 * n);
    }
    turn(v, LANES);
    for (int j = 0; j < LANES; j++) to[j] = (numbers)v[j];
}

/* y of `rows` outputs of one token from o on, given the sums of up's product. */
INLINE numbers changed(const tarsia_serve_block *b, int64_t o, int rows, numbers y, numbers sum) {
    const int weights = b->halves ? TARSIA4_BFLOAT16 : TARSIA4_FLOAT32;
    float room[LANES] = {0};
    if (b->neck) {
        if (b->up_bias) widen(b->up_bias, weights, o, rows, room), sum += load(room);
        return y + b->scale * sum;
    }
    if (b->rank) y += b->scale * sum;
    if (b->gain) y *= rows == LANES ? load(b->gain + o) : (memcpy(room, b->gain + o, 4 * (size_t)rows), load(room));
    if (b->shift) y += rows == LANES ? load(b->shift + o) : (memcpy(room, b->shift + o, 4 * (size_t)rows), load(room));
    return y;
}

INLINE void change(const tarsia_serve_block *b, int64_t t, int64_t o, int rows, numbers sum) {
    float room[LANES] = {0};
    void *at = (char *)b->y + (t * b->y_stride + o) * number_size(b->y_dtype);
    if (b->y_dtype == TARSIA4_FLOAT32 && rows == LANES) {
        put(at, changed(b, o, rows, load(at), sum));
        return;
    }
    widen(at, b->y_dtype, 0, rows, room);
    put(room, changed(b, o, rows, load(room), sum));
    if (b->y_dtype == TARSIA4_FLOAT32) memcpy(at, room, 4 * (size_t)rows);
    else
        for (int i = 0; i < rows; i++) ((uint16_t *)at)[i] = to_bfloat16(room[i]);
}

INLINE void up_as(const tarsia_serve_block *b, int64_t first, int64_t last, int halves) {
    const int64_t some = halves ? 2 * LANES : LANES, size = halves ? 2 : 4;
    const char *end = (const char *)b->up + b->out * b->rank * size;
    numbers columns_here[2 * LANES] = {{0}};
    for (int64_t o = first; o < last; o += LANES) {
        const int rows = last - o < LANES ? (int)(last - o) : LANES;
        numbers sums[TOKENS];
        for (int64_t t = 0; t < b->count; t++) sums[t] = (numbers){0};
        foresee((const char *)b->up + o * b->rank * size, LANES * b->rank * size, end, b->next ? b->next : end);
        for (int64_t k = 0; k < b->rank; k += some) {
            const int n = b->rank - k < some ? (int)(b->rank - k) : (int)some;
            if (halves) columns_of_halves(b, o, rows, k, n, columns_here);
            else columns(b, o, rows, k, n, columns_here);
            const float *h = b->hidden + k;
            int64_t t = 0;
            for (; t + 4 <= b->count; t += 4) {
                numbers s[4];
                for (int i = 0; i < 4; i++) s[i] = sums[t + i];
                for (int j = 0; j < n; j++)
                    for (int i = 0; i < 4; i++) s[i] = FUSED(columns_here[j], all_of(h[(t + i) * b->rank + j]), s[i]);
                for (int i = 0; i < 4; i++) sums[t + i] = s[i];
            }
            for (; t < b->count; t++) {
                numbers s = sums[t];
                for (int j = 0; j < n; j++) s = FUSED(columns_here[j], all_of(h[t * b->rank + j]), s);
                sums[t] = s;
            }
        }
        for (int64_t t = 0; t < b->count; t++) change(b, t, o, rows, sums[t]);
    }
}

static void up(const tarsia_serve_block *b, int64_t first, int64_t last) {
    if (b->halves) up_as(b, first, last, 1);
    else up_as(b, first, last, 0);
}
