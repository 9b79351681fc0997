/* Attention of some queries of one head of the cache, POSITIONS positions at a time, with a running maximum and sum
 * (Milakov and Gimelshein, arXiv:1805.02867). Pieces begin at multiples of POSITIONS, so the order of a query's sums does
 * not depend on where the line was cut. */

typedef struct {
    int64_t rows, dim, wide; /* wide: dim up to a multiple of two registers */
    float *q, *out, *scores, *highest, *total, *keys, *values;
} tile;

/* c[m][n] += a[m][k] b[k][n]: `rows` rows by `wide` registers of columns, constants where this is called. */
INLINE void block_product(const float *a, int64_t a_pitch, const float *b, int64_t b_pitch, float *c, int64_t c_pitch,
                          int64_t k, int rows, int wide) {
    numbers sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < wide; j++) sums[r][j] = load(c + r * c_pitch + j * LANES);
    for (int64_t i = 0; i < k; i++) {
        numbers row[4];
        for (int j = 0; j < wide; j++) row[j] = load(b + i * b_pitch + j * LANES);
        for (int r = 0; r < rows; r++) {
            numbers by = all_of(a[r * a_pitch + i]);
            for (int j = 0; j < wide; j++) sums[r][j] = FUSED(row[j], by, sums[r][j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < wide; j++) put(c + r * c_pitch + j * LANES, sums[r][j]);
}

/* c[m][n] += a[m][k] b[k][n], n a multiple of 2 * LANES. */
static void product(const float *a, int64_t a_pitch, const float *b, int64_t b_pitch, float *c, int64_t c_pitch,
                    int64_t m, int64_t n, int64_t k) {
    for (int64_t j = 0; j < n;) {
        const int four = LANES == 16 && j + 4 * LANES <= n;
        int64_t i = 0;
        for (; i + 4 <= m; i += 4)
            if (four) block_product(a + i * a_pitch, a_pitch, b + j, b_pitch, c + i * c_pitch + j, c_pitch, k, 4, 4);
            else block_product(a + i * a_pitch, a_pitch, b + j, b_pitch, c + i * c_pitch + j, c_pitch, k, 4, 2);
        for (; i < m; i++)
            if (four) block_product(a + i * a_pitch, a_pitch, b + j, b_pitch, c + i * c_pitch + j, c_pitch, k, 1, 4);
            else block_product(a + i * a_pitch, a_pitch, b + j, b_pitch, c + i * c_pitch + j, c_pitch, k, 1, 2);
        j += four ? 4 * LANES : 2 * LANES;
    }
}

/* e^x for x <= 0 to 2 units of the last place; 0 below -87. Coefficients of Cephes' expf. */
INLINE numbers power(numbers x) {
    const numbers magic = all_of(12582912.0f); /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    marks there = x > -87.0f;
    x = (numbers)((marks)x & there);
    numbers whole = FUSED(x, all_of(1.44269504088896341f), magic);
    marks n = (marks)whole - (marks)magic;
    whole -= magic;
    x = FUSED(whole, all_of(-0.693359375f), x);
    x = FUSED(whole, all_of(2.12194440e-4f), x);
    numbers y = all_of(1.9875691500e-4f);
    y = FUSED(y, x, all_of(1.3981999507e-3f));
    y = FUSED(y, x, all_of(8.3334519073e-3f));
    y = FUSED(y, x, all_of(4.1665795894e-2f));
    y = FUSED(y, x, all_of(1.6666665459e-1f));
    y = FUSED(y, x, all_of(5.0000001201e-1f));
    y = FUSED(y, x * x, x + 1.0f);
    return (numbers)(((marks)y + (n << 23)) & there);
}

INLINE float scalar_power(float x) {
    numbers y = power(all_of(x));
    return y[0];
}

/* Positions low..high-1 of the piece that begins at `from`, keys turned, values as they are, the rest zeros. */
static void gather(const tarsia_serve_queries *u, const tile *s, int64_t from, int64_t low, int64_t high) {
    for (int64_t at = 0; at < POSITIONS; at += LANES) {
        const int64_t first = from + at;
        float rows[LANES][LANES];
        const void *of[LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t p = first + i;
            float *value = s->values + (at + i) * s->wide;
            of[i] = NULL;
            if (p < low || p >= high) {
                memset(value, 0, (size_t)s->wide * sizeof *value);
                continue;
            }
            const int64_t place = ((int64_t)u->table[p / u->block] * u->block + p % u->block) * u->position;
            of[i] = number_at(u->keys, u->dtype, place);
            widen(u->values, u->dtype, place, s->dim, value);
            for (int64_t d = s->dim; d < s->wide; d++) value[d] = 0.0f;
        }
        if (first + LANES <= low || first >= high) continue;
        for (int64_t d = 0; d < s->dim; d += LANES) {
            const int64_t n = s->dim - d < LANES ? s->dim - d : LANES;
            words v[LANES];
            for (int i = 0; i < LANES; i++) {
                if (!of[i]) memset(rows[i], 0, sizeof rows[i]);
                else if (n == LANES && u->dtype == TARSIA4_FLOAT32) memcpy(rows[i], (const float *)of[i] + d, sizeof rows[i]);
                else widen(of[i], u->dtype, d, n, rows[i]);
                v[i] = bits_at(rows[i]);
            }
            turn(v, LANES);
            for (int64_t i = 0; i < n; i++) put(s->keys + (d + i) * POSITIONS + at, (numbers)v[i]);
        }
    }
}

/* The scores of one query become what its values weigh; a..b-1 of the piece are seen. */
static void weigh(const tarsia_serve_queries *u, const tile *s, int64_t row, int64_t a, int64_t b) {
    float *scores = s->scores + row * POSITIONS, *out = s->out + row * s->wide, top = s->highest[row];
    if (u->softcap > 0.0f)
        for (int64_t i = a; i < b; i++) scores[i] = u->softcap * tanhf(scores[i] / u->softcap);
    for (int64_t i = 0; i < a; i++) scores[i] = -INFINITY;
    for (int64_t i = b > 0 ? b : 0; i < POSITIONS; i++) scores[i] = -INFINITY;
    numbers most = load(scores);
    marks odd = most != most;
    for (int64_t i = LANES; i < POSITIONS; i += LANES) {
        numbers here = load(scores + i);
        marks more = here > most;
        odd |= here != here;
        most = (numbers)(((marks)here & more) | ((marks)most & ~more));
    }
    for (int i = 0; i < LANES; i++) {
        top = most[i] > top ? most[i] : top;
        if (odd[i]) s->total[row] = NAN; /* a score that is no number is no score that counts for nothing */
    }
    numbers sum = {0};
    for (int64_t i = 0; i < POSITIONS; i += LANES) {
        numbers weight = power(load(scores + i) - top);
        put(scores + i, weight);
        sum += weight;
    }
    const float shrink = scalar_power(s->highest[row] - top);
    s->total[row] = s->total[row] * shrink + SUM(sum);
    s->highest[row] = top;
    if (shrink != 1.0f)
        for (int64_t d = 0; d < s->wide; d += LANES) put(out + d, load(out + d) * shrink);
}

static void piece(const tarsia_serve_queries *u, const tile *s, int64_t from, int64_t low, int64_t high) {
    gather(u, s, from, low, high);
    const int64_t seen = high - from < POSITIONS ? high - from : POSITIONS;
    memset(s->scores, 0, (size_t)(s->rows * POSITIONS) * sizeof *s->scores);
    const int64_t columns = (seen + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    product(s->q, s->wide, s->keys, POSITIONS, s->scores, POSITIONS, s->rows, columns, s->dim);
    for (int64_t row = 0; row < s->rows; row++) {
        const int64_t own = u->first + row / u->group;
        int64_t a = u->window > 0 && own - u->window + 1 > from ? own - u->window + 1 - from : 0;
        int64_t b = own + 1 - from < POSITIONS ? own + 1 - from : POSITIONS;
        if (b > a) weigh(u, s, row, a, b);
        else memset(s->scores + row * POSITIONS, 0, POSITIONS * sizeof *s->scores);
    }
    product(s->scores, POSITIONS, s->values, s->wide, s->out, s->wide, s->rows, s->wide, seen);
}

static void attend(const tarsia_serve_queries *u) {
    tile s = {u->tokens * u->group, u->dim, padded(u->dim), u->room, 0, 0, 0, 0, 0, 0};
    s.out = s.q + s.rows * s.wide, s.scores = s.out + s.rows * s.wide;
    s.keys = s.scores + s.rows * POSITIONS, s.values = s.keys + s.wide * POSITIONS;
    s.highest = s.values + s.wide * POSITIONS, s.total = s.highest + s.rows;
    memset(s.out, 0, (size_t)(s.rows * s.wide) * sizeof *s.out);
    for (int64_t row = 0; row < s.rows; row++) {
        const int64_t place = row / u->group * u->q_token + row % u->group * u->q_head;
        widen(u->q, u->dtype, place, s.dim, s.q + row * s.wide);
        for (int64_t d = 0; d < s.dim; d++) s.q[row * s.wide + d] *= u->scale;
        s.highest[row] = -INFINITY, s.total[row] = 0.0f;
    }
    const int64_t last = u->first + u->tokens;
    const int64_t low = u->window > 0 && u->first - u->window + 1 > 0 ? u->first - u->window + 1 : 0;
    for (int64_t from = low / POSITIONS * POSITIONS; from < last; from += POSITIONS)
        piece(u, &s, from, low > from ? low : from, last < from + POSITIONS ? last : from + POSITIONS);
    for (int64_t row = 0; row < s.rows; row++) {
        const int64_t place = row / u->group * u->out_token + row % u->group * s.dim;
        const float by = 1.0f / s.total[row], *out = s.out + row * s.wide;
        for (int64_t d = 0; d < s.dim; d++) store_number(u->out, u->dtype, place + d, out[d] * by);
    }
}
