/* The pass over a band of rows, for one instruction set; see kernel.c for what it adds up and why.

   Runs of whole vectors go through `fast`, which looks at nothing. Ends of rows, and rows of which a value is not finite, go
   through `masked`, which puts the pilot, a deviation of zero, in the place of what does not count. */

#include "lanes.h"

typedef struct {
    N(vd) s1, s2, s3, s4; /* powers of deviations from the pilot */
    N(vf) low, high;
    N(vi) zero_lanes;
    int64_t zeros, nan, inf;
    float pilot;
} N(state);

/* One row of a tile, `length` values in whole vectors; the next row lies `next` bytes on. Returns whether all values are finite;
   where not, the sums of units are as they should be and those of moments are left alone. */
INLINE int N(fast)(const int kind, const int shifted, const int units, const char *p, int64_t length, int64_t next, N(state) *t,
                   double *columns, double row[2])
{
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    const double pilot = t->pilot;
    N(vd) r1 = {0}, r2 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, s4 = {0}, none = {0};
    N(vf) low = t->low, high = t->high;
    N(vi) zeros = t->zero_lanes;
    for (int64_t i = 0; i < length; i += LANES) {
        __builtin_prefetch(p + next + i * size);
        const N(vf) x = N(load)(kind, p + i * size);
        low = N(least)(x, low);
        high = N(most)(x, high);
        zeros = N(count_zeros)(zeros, x);
        N(vd) a = N(lower)(x), b = N(upper)(x), aa, bb;
        if (!shifted || units) {
            aa = a * a, bb = b * b;
            r1 += a + b;
            r2 += aa + bb;
        }
        if (units) {
            N(vd) *c = (N(vd) *)(columns + 2 * i);
            c[0] += a;
            c[1] += b;
            c[2] += aa;
            c[3] += bb;
        }
        if (shifted) {
            a = a - pilot, b = b - pilot;
            aa = a * a, bb = b * b;
            s1 += a + b;
            s2 += aa + bb;
        }
        s3 += aa * a;
        s3 += bb * b;
        s4 += aa * aa;
        s4 += bb * bb;
    }
    row[0] = N(sum)(!shifted || units ? r1 : s1);
    row[1] = N(sum)(!shifted || units ? r2 : none);
    if (!isfinite(row[0]))
        return 0;
    t->s1 += shifted ? s1 : r1;
    t->s2 += shifted ? s2 : r2;
    t->s3 += s3, t->s4 += s4, t->low = low, t->high = high, t->zero_lanes = zeros;
    return 1;
}

/* The same for types of one byte, whose values have few digits and no great range: products are of float32, and added up in it
   a few at a time, as what is small beside a sum is lost in it. */
INLINE int N(narrow)(const int shifted, const int units, const char *p, int64_t length, N(state) *t, float *columns,
                     double row[2])
{
    N(vd) r1 = {0}, r2 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, s4 = {0};
    N(vf) low = t->low, high = t->high;
    const N(vf) pilot = N(all)(t->pilot);
    for (int64_t i = 0; i < length;) {
        N(vf) f1 = {0}, f2 = {0}, d1 = {0}, d2 = {0}, d3 = {0}, d4 = {0};
        for (const int64_t end = length - i < FEW * LANES ? length : i + FEW * LANES; i < end; i += LANES) {
            const N(vf) x = N(load_float32)(p + 4 * i);
            low = N(least)(x, low);
            high = N(most)(x, high);
            N(vf) d = x, square = x * x;
            f1 += x;
            f2 += square;
            if (units) {
                N(vf) *c = (N(vf) *)(columns + 2 * i);
                c[0] += x;
                c[1] += square;
            }
            if (shifted) {
                d = x - pilot, square = d * d;
                d1 += d;
                d2 += square;
            }
            d3 += square * d;
            d4 += square * square;
        }
        r1 += N(folded)(f1);
        r2 += N(folded)(f2);
        if (shifted) {
            s1 += N(folded)(d1);
            s2 += N(folded)(d2);
        }
        s3 += N(folded)(d3);
        s4 += N(folded)(d4);
    }
    row[0] = N(sum)(r1);
    row[1] = N(sum)(r2);
    if (!isfinite(row[0]))
        return 0;
    t->s1 += shifted ? s1 : r1;
    t->s2 += shifted ? s2 : r2;
    t->s3 += s3, t->s4 += s4, t->low = low, t->high = high;
    return 1;
}

/* `length` values of any kind; columns and row are NULL where their sums are known. Returns whether all values are finite. */
static int N(masked)(int kind, const char *p, int64_t length, N(state) *t, double *columns, double row[2])
{
    const int64_t size = kind == FLOAT32 ? 4 : 2, nan = t->nan, inf = t->inf;
    const N(vf) limit = N(all)(INFINITY), pilot = N(all)(t->pilot), none = {0};
    N(vd) r1 = {0}, r2 = {0};
    for (int64_t i = 0; i < length; i += LANES) {
        const N(vm) there = N(first)(length - i);
        const N(vf) x = N(load_some)(kind, p + i * size, length - i, there);
        const N(vm) finite = N(both)(there, N(below)(x, limit));
        const int64_t odd = N(number)(N(both)(there, N(unequal)(x, x)));
        t->nan += odd;
        t->inf += N(number)(there) - N(number)(finite) - odd;
        if (odd == N(number)(there)) { /* nothing but NaN, which every sum becomes */
            r1 += (double)NAN;
            r2 += (double)NAN;
            for (int k = 0; columns && k < 4; k++)
                ((N(vd) *)(columns + 2 * i))[k] = r1;
            continue;
        }
        if (row) {
            const N(vd) a = N(lower)(x), b = N(upper)(x);
            r1 += a + b;
            r2 += a * a + b * b;
            if (columns) {
                N(vd) *c = (N(vd) *)(columns + 2 * i);
                c[0] += a, c[1] += b, c[2] += a * a, c[3] += b * b;
            }
        }
        if (!N(number)(finite))
            continue;
        t->zeros += N(number)(finite) - N(number)(N(both)(finite, N(unequal)(x, none)));
        t->low = N(least)(N(choose)(finite, x, limit), t->low);
        t->high = N(most)(N(choose)(finite, x, -limit), t->high);
        const N(vf) y = N(choose)(finite, x, pilot);
        const N(vd) a = N(lower)(y) - (double)t->pilot, b = N(upper)(y) - (double)t->pilot, aa = a * a, bb = b * b;
        t->s1 += a + b;
        t->s2 += aa + bb;
        t->s3 += aa * a + bb * b;
        t->s4 += aa * aa + bb * bb;
    }
    if (row)
        row[0] += N(sum)(r1), row[1] += N(sum)(r2);
    return t->nan == nan && t->inf == inf;
}

/* Sums of sums lose fewer digits than sums of everything. */
INLINE void N(empty)(N(state) *t, output *out)
{
    const N(vd) none = {0};
    out->s1 += N(sum)(t->s1), out->s2 += N(sum)(t->s2), out->s3 += N(sum)(t->s3), out->s4 += N(sum)(t->s4);
    t->s1 = t->s2 = t->s3 = t->s4 = none;
}

/* The sums of at most as many columns as there are lanes, lower and upper, are added to those at `to`. */
INLINE void N(add_up)(double *to, N(vd) lower, N(vd) upper, int64_t width)
{
    N(vd) both[2], more[2] = {lower, upper};
    if (width == LANES) {
        memcpy(both, to, sizeof both);
        both[0] += lower, both[1] += upper;
        memcpy(to, both, sizeof both);
        return;
    }
    double each[LANES];
    memcpy(each, more, sizeof each);
    for (int64_t i = 0; i < width; i++)
        to[i] += each[i];
}

/* What `slim` adds up of a matrix, in registers. */
typedef struct {
    N(vd) a, b, aa, bb; /* of each column, lower and upper lanes: values and squares */
    N(vd) a3, b3, a4, b4;
    N(vf) low, high;
    N(vi) zeros;
} N(lanes);

/* One row of no more columns than a vector has lanes: `sum` and `square` are of its values and of their squares, not yet put together. */
INLINE void N(slim_row)(const int kind, const char *p, int64_t width, N(vm) there, N(lanes) *l, N(vd) *sum, N(vd) *square)
{
    const N(vf) x = N(load_some)(kind, p, width, there);
    const N(vd) a = N(lower)(x), b = N(upper)(x), aa = a * a, bb = b * b;
    *sum = a + b, *square = aa + bb;
    l->low = N(least_of)(there, x, l->low);
    l->high = N(most_of)(there, x, l->high);
    l->zeros = N(count_zeros)(l->zeros, x);
    l->a += a, l->b += b, l->aa += aa, l->bb += bb;
    l->a3 += aa * a, l->b3 += bb * b, l->a4 += aa * aa, l->b4 += bb * bb;
}

/* The first rows of a matrix of no more columns than a vector has lanes. Returns how many rows these are: all, or those before some
   that are not all finite. */
INLINE int64_t N(slim)(const int kind, const int64_t width, const input *in, N(state) *t, output *out)
{
    const int64_t bytes = width * (kind == FLOAT32 ? 4 : 2);
    const N(vm) there = N(first)(width);
    int64_t r = 0;
    while (r < in->rows) {
        const int64_t count = in->rows - r < MANY_ROWS ? in->rows - r : MANY_ROWS;
        const char *p = in->data + r * bytes;
        double *sums = in->row_sums + r, *squares = in->row_squares + r;
        uint64_t *hashes = in->row_hashes + r;
        N(lanes) l = {.low = t->low, .high = t->high, .zeros = t->zero_lanes};
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            N(vd) sum[4], square[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                N(slim_row)(kind, p + k * bytes, width, there, &l, &sum[k], &square[k]);
                hashes[i + k] = hash_short(p + k * bytes, bytes, in->odd);
            }
            N(sums_of_four)(sum, square, sums + i, squares + i);
            p += 4 * bytes;
        }
        for (; i < count; i++, p += bytes) {
            N(vd) sum, square;
            N(slim_row)(kind, p, width, there, &l, &sum, &square);
            hashes[i] = hash_short(p, bytes, in->odd);
            sums[i] = N(sum)(sum), squares[i] = N(sum)(square);
        }
        const double total = N(sum)(l.a + l.b);
        if (!isfinite(total))
            break;
        N(add_up)(in->column_sums, l.a, l.b, width);
        N(add_up)(in->column_squares, l.aa, l.bb, width);
        out->s1 += total, out->s2 += N(sum)(l.aa + l.bb), out->s3 += N(sum)(l.a3 + l.b3), out->s4 += N(sum)(l.a4 + l.b4);
        t->low = l.low, t->high = l.high, t->zero_lanes = l.zeros;
        t->zeros -= count * (LANES - width); /* the lanes beside it */
        r += count;
    }
    return r;
}

INLINE void N(band)(const int kind, const int single, const int shifted, const int units, const input *in, output *out)
{
    const int64_t size = kind == FLOAT32 ? 4 : 2, stored = in->table ? 1 : size; /* bytes as they are read, and as they lie */
    N(state) t;
    t.s1 = t.s2 = t.s3 = t.s4 = (N(vd)){0}; /* one by one: of the whole, the compiler makes a slow loop */
    t.low = N(all)(INFINITY), t.high = N(all)(-INFINITY), t.zero_lanes = (N(vi)){0};
    t.zeros = t.nan = t.inf = 0, t.pilot = out->pilot;
    out->s1 = out->s2 = out->s3 = out->s4 = 0;
    /* How far on what is read next lies: in the next row, or in the one that there is. */
    const int64_t next = in->rows > 1 ? in->columns : 2 * TILE;
    ALIGNED double columns[2 * TILE];
    ALIGNED float singles[2 * TILE];
    ALIGNED float widened[TILE];
    int64_t zeros = 0; /* of one byte, counted when they are looked up */
    int64_t done = 0;
    if (units && !shifted && !in->table && in->columns <= LANES)
        done = in->columns == LANES ? N(slim)(kind, LANES, in, &t, out) : N(slim)(kind, in->columns, in, &t, out);
    for (int64_t left = 0; done < in->rows && left < in->columns; left += TILE) {
        const int64_t width = in->columns - left < TILE ? in->columns - left : TILE;
        const int64_t whole = width / LANES * LANES, padded = (width + LANES - 1) / LANES * LANES;
        int finite = 1;
        if (units) {
            memset(columns, 0, (size_t)(2 * padded) * sizeof *columns);
            if (single)
                memset(singles, 0, (size_t)(2 * padded) * sizeof *singles);
        }
        for (int64_t r = done; r < in->rows; r++) {
            const char *stored_at = in->data + (r * in->columns + left) * stored, *p = stored_at;
            double row[2] = {0, 0};
            if (in->table) {
                zeros += in->widen(widened, (const uint8_t *)p, width, next, in->table);
                p = (const char *)widened;
            }
            if (!finite) { /* and so is this row, most likely */
                finite = N(masked)(kind, p, width, &t, units ? columns : NULL, row);
            } else {
                finite = single ? N(narrow)(shifted, units, p, whole, &t, singles, row)
                                : N(fast)(kind, shifted, units, p, whole, in->table ? 0 : next * size, &t, columns, row);
                if (!finite)
                    N(masked)(kind, p, whole, &t, NULL, NULL);
                if (whole < width)
                    finite &= N(masked)(kind, p + whole * size, width - whole, &t, units ? columns + 2 * whole : NULL, row);
            }
            if (units) {
                const uint64_t found = hash(stored_at, width * stored, in->odd + left * stored / 8);
                in->row_sums[r] = row[0] + (left ? in->row_sums[r] : 0);
                in->row_squares[r] = row[1] + (left ? in->row_squares[r] : 0);
                in->row_hashes[r] = found + (left ? in->row_hashes[r] : 0);
            }
            if (r % MANY_ROWS == MANY_ROWS - 1)
                N(empty)(&t, out);
            if (single && units && (r % RUN == RUN - 1 || r == in->rows - 1)) {
                for (int64_t i = 0; i < 2 * padded; i++)
                    columns[i] += (double)singles[i], singles[i] = 0;
            }
        }
        for (int64_t i = 0; units && i < width; i += LANES) {
            const int64_t many = width - i < LANES ? width - i : LANES;
            const N(vd) *c = (const N(vd) *)(columns + 2 * i);
            N(add_up)(in->column_sums + left + i, c[0], c[1], many);
            N(add_up)(in->column_squares + left + i, c[2], c[3], many);
        }
    }
    if (done < in->rows)
        N(empty)(&t, out);
    out->low = N(lowest)(t.low), out->high = N(highest)(t.high);
    out->zeros = in->table ? zeros : t.zeros + N(counted)(t.zero_lanes);
    out->nan = t.nan, out->inf = t.inf;
}

/* Compiled for each combination, so that the innermost loops ask nothing. */
#define KINDS(units, shifted)                                                                                                      \
    if (in->single)                                                                                                                \
        N(band)(FLOAT32, 1, shifted, units, in, out);                                                                             \
    else if (in->kind == FLOAT32)                                                                                                  \
        N(band)(FLOAT32, 0, shifted, units, in, out);                                                                              \
    else if (in->kind == FLOAT16)                                                                                                  \
        N(band)(FLOAT16, 0, shifted, units, in, out);                                                                              \
    else                                                                                                                           \
        N(band)(BFLOAT16, 0, shifted, units, in, out)

static void N(pass)(const input *in, output *out)
{
    if (in->row_sums && out->pilot != 0) {
        KINDS(1, 1);
    } else if (in->row_sums) {
        KINDS(1, 0);
    } else if (out->pilot != 0) {
        KINDS(0, 1);
    } else {
        KINDS(0, 0);
    }
}

#undef KINDS

/* Of n float32: their sum, the sum of their squares, the least and the greatest. Floats add up in each lane for a stretch. */
static void N(survey)(const char *data, int64_t n, double out[4])
{
    const int64_t step = 4 * LANES, stretch = STRETCH * step;
    N(vd) sums = {0}, squares = {0};
    N(vf) low = N(all)(INFINITY), high = N(all)(-INFINITY);
    int64_t i = 0;
    while (i + step <= n) {
        const int64_t end = i + (n - i < stretch ? (n - i) / step * step : stretch);
        N(vf) s[4] = {{0}}, q[4] = {{0}};
        for (; i < end; i += step) {
            for (int k = 0; k < 4; k++) {
                const N(vf) x = N(load_float32)(data + 4 * (i + k * LANES));
                s[k] += x;
                q[k] += x * x;
                low = N(least)(low, x);
                high = N(most)(high, x);
            }
        }
        s[0] = (s[0] + s[1]) + (s[2] + s[3]), q[0] = (q[0] + q[1]) + (q[2] + q[3]);
        sums += N(lower)(s[0]) + N(upper)(s[0]);
        squares += N(lower)(q[0]) + N(upper)(q[0]);
    }
    out[0] = out[1] = 0, out[2] = INFINITY, out[3] = -INFINITY;
    for (int k = 0; k < LANES; k++) {
        out[2] = low[k] < out[2] ? low[k] : out[2];
        out[3] = high[k] > out[3] ? high[k] : out[3];
    }
    for (int k = 0; k < LANES / 2; k++)
        out[0] += sums[k], out[1] += squares[k];
    for (; i < n; i++) {
        float x;
        memcpy(&x, data + 4 * i, 4);
        out[0] += x, out[1] += (double)(x * x);
        out[2] = x < out[2] ? x : out[2], out[3] = x > out[3] ? x : out[3];
    }
}
