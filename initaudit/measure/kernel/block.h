/* What is done with a block of a matrix, for one instruction set: its rows widened to float32, and a Krylov space of it. */

/* `length` values of any kind but bytes as float32. */
static void N(widen)(int kind, const char *from, int64_t length, float *to)
{
    const int64_t size = kind == FLOAT32 ? 4 : 2, whole = length / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        const N(vf) x = N(load)(kind, from + i * size);
        memcpy(to + i, &x, sizeof x);
    }
    char rest[4 * LANES] = {0};
    memcpy(rest, from + whole * size, (size_t)((length - whole) * size));
    const N(vf) x = N(load)(kind, rest);
    memcpy(to + whole, &x, (size_t)(length - whole) * 4);
}

INLINE N(vf) N(at)(const float *p) { return N(load_float32)((const char *)p); }

INLINE float N(total)(N(vf) x)
{
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += x[i];
    return total;
}

static float N(dot)(const float *a, const float *b, int64_t n)
{
    N(vf) s[4] = {{0}};
    float total = 0;
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++)
            s[k] += N(at)(a + i + k * LANES) * N(at)(b + i + k * LANES);
    for (; i < n; i++)
        total += a[i] * b[i];
    return total + N(total)((s[0] + s[1]) + (s[2] + s[3]));
}

static void N(add)(float *to, float factor, const float *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] += factor * from[i];
}

/* images = B v, and B^T images is added to `to`, of one reading of B: four rows at a time, which stay in a first-level cache. */
static void N(both_sides)(const float *b, int64_t rows, int64_t columns, const float *v, float *images, float *to)
{
    const int64_t whole = columns / LANES * LANES;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *row[4];
        N(vf) s[4] = {{0}};
        for (int k = 0; k < 4; k++)
            row[k] = b + (r + k) * columns;
        for (int64_t i = 0; i < whole; i += LANES) {
            const N(vf) x = N(at)(v + i);
            for (int k = 0; k < 4; k++) {
                __builtin_prefetch(row[k] + 4 * columns + i);
                s[k] += N(at)(row[k] + i) * x;
            }
        }
        float y[4];
        for (int k = 0; k < 4; k++) {
            y[k] = N(total)(s[k]);
            for (int64_t i = whole; i < columns; i++)
                y[k] += row[k][i] * v[i];
            images[r + k] = y[k];
        }
        for (int64_t i = 0; i < whole; i += LANES) {
            N(vf) x = N(at)(to + i);
            for (int k = 0; k < 4; k++)
                x += N(all)(y[k]) * N(at)(row[k] + i);
            memcpy(to + i, &x, sizeof x);
        }
        for (int64_t i = whole; i < columns; i++)
            for (int k = 0; k < 4; k++)
                to[i] += y[k] * row[k][i];
    }
    for (; r < rows; r++) {
        images[r] = N(dot)(b + r * columns, v, columns);
        N(add)(to, images[r], b + r * columns, columns);
    }
}

/* As `_krylov` in initaudit/measure/spectrum.py, which says what becomes of it. */
static int64_t N(krylov)(const float *b, int64_t rows, int64_t columns, int64_t steps, float *basis, float *images)
{
    for (int64_t step = 0; step < steps; step++) {
        float *v = basis + step * columns, *next = v + columns;
        const float length = sqrtf(N(dot)(v, v, columns));
        for (int twice = 0; twice < 2; twice++)
            for (const float *before = basis; before < v; before += columns)
                N(add)(v, -N(dot)(v, before, columns), before, columns);
        const float rest = sqrtf(N(dot)(v, v, columns));
        if (!(rest > ROUNDING * length))
            return step;
        for (int64_t i = 0; i < columns; i++)
            v[i] /= rest;
        memset(next, 0, (size_t)columns * sizeof *next);
        N(both_sides)(b, rows, columns, v, images + step * rows, next);
    }
    return steps;
}
