/* Everything that static rules read of a matrix, in one pass over its bytes, and the spectrum of a block of it;
   initaudit/measure/fused.py calls it.

   Sums are of float64 about a pilot near the mean, so that they depend on neither the order nor the partition of the values
   beyond the last digits; those of types of one byte are of float32 in short runs. Nothing here reads or writes beyond the
   buffers of its caller: every length is compared with the shape first. Python is left alone (no GIL) while the pass runs.

   Built as an optional extension: where it is not there, numpy does the same (initaudit/measure/units.py). */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "needs the vector types of GCC and Clang; without this extension numpy does its work"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "reads little-endian words; without this extension numpy does its work"
#endif

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))

enum { VERSION = 2 }; /* of the functions: as in initaudit/measure/fused.py, which leaves one of another version alone */
enum { FLOAT32, BFLOAT16, FLOAT16, BYTE };
enum {
    TILE = 1024,   /* columns whose sums stay in a first-level cache: 16 KiB of them */
    RUN = 16,      /* rows whose columns are summed in float32, for types of one byte */
    FEW = 8,       /* vectors that are, for their moments */
    MANY_ROWS = 512, /* whose sums are put together before they are added to those of all */
    HEAD = 1024,   /* values that the pilot is taken from */
    MANY = 16384,  /* values that make looking at the head worth while */
    STRETCH = 64,  /* vectors of a survey that are added up in float32 */
};
/* A mean this many standard deviations from the pilot costs its fourth power of the digits of a kurtosis. */
static const double FAR = 4.0;
/* Fourth powers of values within these bounds, and sums of many, stay in the range of float32. */
static const float LARGEST = 1e8f, SMALLEST = 1e-8f;
/* What is left of a vector when all directions of a space are taken out, where it lay in the space: as in spectrum.py. */
static const float ROUNDING = 1e-5f;

/* The value of each of n bytes, whose bfloat16 the table holds; the next row lies `next` bytes on. Returns how many are zero. */
typedef int64_t widener(float *, const uint8_t *, int64_t n, int64_t next, const uint16_t *);

typedef struct {
    const char *data;
    int64_t rows, columns;
    int kind, single;
    const uint16_t *table; /* the bfloat16 of each byte */
    widener *widen;
    const uint64_t *odd; /* a factor for each word of 8 bytes of a row */
    double *row_sums, *row_squares, *column_sums, *column_squares;
    uint64_t *row_hashes;
} input;

typedef struct {
    float pilot, low, high;
    double s1, s2, s3, s4; /* sums of powers of deviations from the pilot */
    int64_t zeros, nan, inf;
} output;

/* The sum of words times odd numbers modulo 2^64, as in initaudit/measure/symmetry.py; a last piece of a word ends in zeros. */
INLINE uint64_t hash(const char *p, int64_t bytes, const uint64_t *odd)
{
    uint64_t total = 0, word = 0;
    const int64_t whole = bytes / 8;
    for (int64_t i = 0; i < whole; i++) {
        memcpy(&word, p + 8 * i, 8);
        total += (word ^ (word >> 32)) * odd[i];
    }
    if (bytes % 8) {
        word = 0;
        memcpy(&word, p + 8 * whole, (size_t)(bytes % 8));
        total += (word ^ (word >> 32)) * odd[whole];
    }
    return total;
}

static int64_t look_up(float *to, const uint8_t *from, int64_t n, int64_t next, const uint16_t *table)
{
    int64_t zeros = 0;
    (void)next;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)table[from[i]] << 16;
        memcpy(to + i, &bits, 4);
        zeros += bits << 1 == 0;
    }
    return zeros;
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define N(name) JOIN(name, SET)

#define SET plain
#define LANES 4
#include "pass.h"
#include "block.h"
#undef SET
#undef LANES

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#define ALLOW(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FORBID PRAGMA(clang attribute pop)
#else
#define ALLOW(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define FORBID PRAGMA(GCC pop_options)
#endif
#define PRAGMA(text) _Pragma(#text)

ALLOW("avx2,fma,f16c")
#define SET avx2
#define LANES 8
#include "pass.h"
#include "block.h"
#undef SET
#undef LANES
FORBID

ALLOW("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define SET avx512
#define LANES 16
#include "pass.h"
#include "block.h"
#undef SET
#undef LANES
FORBID

ALLOW("avx512f,avx512bw,avx512vbmi")
/* Both bytes of 64 values at once, each out of four registers. */
static int64_t permute(float *to, const uint8_t *from, int64_t n, int64_t next, const uint16_t *table)
{
    __m512i low[4], high[4];
    const __m512i byte = _mm512_set1_epi16(0xff), all = _mm512_set1_epi8(-1);
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_loadu_si512(table + 64 * i), b = _mm512_loadu_si512(table + 64 * i + 32);
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        low[i] = _mm512_permutexvar_epi64(order, _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
        high[i] = _mm512_permutexvar_epi64(order, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
    }
    int64_t i = 0, zeros = 0;
    for (; i + 64 <= n; i += 64) {
        __builtin_prefetch(from + i + next);
        /* In the order in which lanes of four values are put together below. */
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i at = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(from + i)), zero = _mm512_setzero_si512();
        const __mmask64 upper = _mm512_movepi8_mask(at);
        const __m512i l = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(low[0], at, low[1]),
                                                 _mm512_permutex2var_epi8(low[2], at, low[3]));
        const __m512i h = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(high[0], at, high[1]),
                                                 _mm512_permutex2var_epi8(high[2], at, high[3]));
        zeros += 64 - __builtin_popcountll(_mm512_test_epi8_mask(_mm512_or_si512(_mm512_add_epi8(h, h), l), all));
        const __m512i first = _mm512_unpacklo_epi8(l, h), second = _mm512_unpackhi_epi8(l, h);
        _mm512_storeu_si512(to + i, _mm512_unpacklo_epi16(zero, first));
        _mm512_storeu_si512(to + i + 16, _mm512_unpackhi_epi16(zero, first));
        _mm512_storeu_si512(to + i + 32, _mm512_unpacklo_epi16(zero, second));
        _mm512_storeu_si512(to + i + 48, _mm512_unpackhi_epi16(zero, second));
    }
    return zeros + look_up(to + i, from + i, n - i, next, table);
}
FORBID
#endif

typedef void passer(const input *, output *);
typedef void surveyor(const char *, int64_t, double[4]);
typedef void converter(int, const char *, int64_t, float *);
typedef int64_t searcher(const float *, int64_t, int64_t, int64_t, float *, float *);

static struct {
    int levels;
    passer *pass[3];
    surveyor *survey[3];
    converter *convert[3];
    searcher *krylov[3];
    widener *widen;
} best = {1, {pass_plain}, {survey_plain}, {widen_plain}, {krylov_plain}, look_up};

static void choose_best(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return;
    best.survey[best.levels] = survey_avx2;
    best.convert[best.levels] = widen_avx2;
    best.krylov[best.levels] = krylov_avx2;
    best.pass[best.levels++] = pass_avx2;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return;
    best.survey[best.levels] = survey_avx512;
    best.convert[best.levels] = widen_avx512;
    best.krylov[best.levels] = krylov_avx512;
    best.pass[best.levels++] = pass_avx512;
    if (__builtin_cpu_supports("avx512vbmi"))
        best.widen = permute;
#endif
}

/* With the digits of a bfloat16 for types of one byte: their deviations, and sums of these, are then exact. */
static float rounded(const input *in, double mean)
{
    float pilot = (float)mean;
    if (in->single) {
        uint32_t bits;
        memcpy(&bits, &pilot, 4);
        bits = (bits + 0x8000u) & 0xffff0000u;
        memcpy(&pilot, &bits, 4);
    }
    return pilot;
}

/* Whether the mean of what was measured is too far from the pilot; then there is a better one. */
static int better_pilot(const input *in, output *out)
{
    const double n = (double)(in->rows * in->columns - out->nan - out->inf), e = out->s1 / n, pilot = out->pilot;
    if (!(out->low < out->high) || e * e <= FAR * FAR * (out->s2 / n - e * e))
        return 0;
    out->pilot = rounded(in, out->pilot + e);
    return out->pilot != pilot;
}

static void measure(const input *in, output *out, passer *pass)
{
    input again = *in;
    const int64_t n = in->rows * in->columns;
    again.row_sums = NULL;
    out->pilot = 0;
    if (n >= MANY) {
        output head = {0};
        input first = again;
        first.rows = 1, first.columns = HEAD;
        pass(&first, &head);
        if (better_pilot(&first, &head))
            out->pilot = head.pilot;
    }
    pass(in, out);
    if (better_pilot(in, out))
        pass(&again, out);
}

/* Sums of powers about the mean from those about the pilot. */
static PyObject *as_moments(const input *in, const output *out)
{
    const int64_t count = in->rows * in->columns - out->nan - out->inf;
    double mean = 0, m2 = 0, m3 = 0, m4 = 0, low = NAN, high = NAN;
    if (count) {
        /* Both zeros are the same. */
        low = (double)out->low + 0.0, high = (double)out->high + 0.0;
        mean = low;
    }
    if (low < high) {
        const double e = out->s1 / (double)count;
        mean = out->pilot + e;
        m2 = fmax(out->s2 - e * out->s1, 0);
        m3 = out->s3 - 3 * e * out->s2 + 2 * e * e * out->s1;
        m4 = fmax(out->s4 - 4 * e * out->s3 + 6 * e * e * out->s2 - 3 * e * e * e * out->s1, 0);
    }
    return Py_BuildValue("LddddddLLL", (long long)count, mean, m2, m3, m4, low, high, (long long)out->zeros, (long long)out->nan,
                         (long long)out->inf);
}

/* A buffer of at least `bytes` bytes, at an address that is a multiple of `unit`; 0 and an exception where it is not. */
static int take(PyObject *from, Py_buffer *to, int flags, int64_t bytes, size_t unit, const char *name)
{
    if (PyObject_GetBuffer(from, to, flags) < 0)
        return 0;
    if (to->len >= bytes && (uintptr_t)to->buf % unit == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes where %lld were expected", name, to->len, (long long)bytes);
    PyBuffer_Release(to);
    return 0;
}

static const int sizes[] = {4, 2, 2, 1};
static const int64_t limit = INT64_C(1) << 40;

static int pass_arguments(PyObject *args, input *in, Py_buffer views[4], int *used, int *level)
{
    Py_ssize_t rows, columns, top, all;
    PyObject *data, *table, *odd, *sums;
    if (!PyArg_ParseTuple(args, "iOnnOOOnni", &in->kind, &data, &rows, &columns, &table, &odd, &sums, &top, &all, level))
        return 0;
    if (in->kind < FLOAT32 || in->kind > BYTE || rows < 0 || columns < 0 || top < 0 || all < rows || top > all - rows ||
        all > limit || columns > limit || (columns && rows > (limit >> 8) / columns)) {
        PyErr_SetString(PyExc_ValueError, "an unknown kind or an impossible shape");
        return 0;
    }
    const int64_t size = sizes[in->kind];
    if (!take(data, &views[(*used)++], PyBUF_SIMPLE, rows * columns * size, 1, "data"))
        return --*used, 0;
    in->data = views[0].buf, in->rows = rows, in->columns = columns;
    if (in->kind == BYTE) {
        if (!take(table, &views[(*used)++], PyBUF_SIMPLE, 512, 2, "table"))
            return --*used, 0;
        in->table = views[*used - 1].buf;
        in->kind = FLOAT32; /* once they are widened */
        in->single = 1;
        for (int i = 0; i < 256; i++) {
            const uint32_t bits = (uint32_t)(in->table[i] & 0x7fff) << 16;
            float value;
            memcpy(&value, &bits, 4);
            in->single &= value == 0 || !isfinite(value) || (SMALLEST < value && value < LARGEST);
        }
    }
    if (sums == Py_None)
        return 1;
    if (!take(odd, &views[(*used)++], PyBUF_SIMPLE, (columns * size + 7) / 8 * 8, 8, "odd"))
        return --*used, 0;
    in->odd = views[*used - 1].buf;
    if (!take(sums, &views[(*used)++], PyBUF_WRITABLE, (3 * all + 2 * columns) * 8, 8, "sums"))
        return --*used, 0;
    double *to = views[*used - 1].buf;
    in->row_sums = to + top, in->row_squares = to + all + top, in->row_hashes = (uint64_t *)(to + 2 * all) + top;
    in->column_sums = to + 3 * all, in->column_squares = to + 3 * all + columns;
    return 1;
}

static int level_of(int asked)
{
    return asked < 0 || asked >= best.levels ? best.levels - 1 : asked;
}

static PyObject *kernel_measure(PyObject *self, PyObject *args)
{
    (void)self;
    input in = {.widen = best.widen};
    output out = {0};
    Py_buffer views[4];
    PyObject *found = NULL;
    int used = 0, level = 0;
    if (pass_arguments(args, &in, views, &used, &level)) {
        level = level_of(level);
        Py_BEGIN_ALLOW_THREADS
        measure(&in, &out, best.pass[level]);
        Py_END_ALLOW_THREADS
        found = as_moments(&in, &out);
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}

static PyObject *kernel_survey(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *data;
    Py_buffer view;
    int level;
    double out[4];
    if (!PyArg_ParseTuple(args, "Oi", &data, &level) || !take(data, &view, PyBUF_SIMPLE, 0, 1, "data"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    best.survey[level_of(level)](view.buf, view.len / 4, out);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return Py_BuildValue("dddd", out[0], out[1], out[2], out[3]);
}

/* Whether a product of these is a number of elements that there can be; 0 and an exception where it is not. */
static int few(int64_t count, int64_t width)
{
    if (width == 0 || count <= limit / width)
        return 1;
    PyErr_SetString(PyExc_ValueError, "an impossible shape");
    return 0;
}

/* Rows `places` of a matrix, from column `left` on, as float32 rows of `width`. */
static PyObject *kernel_gather(PyObject *self, PyObject *args)
{
    (void)self;
    int kind, level, used = 0;
    Py_ssize_t rows, columns, left, width;
    PyObject *data, *table, *places, *to, *found = NULL;
    Py_buffer views[4];
    if (!PyArg_ParseTuple(args, "iOnnOOnnOi", &kind, &data, &rows, &columns, &table, &places, &left, &width, &to, &level))
        return NULL;
    if (kind < FLOAT32 || kind > BYTE || rows < 0 || columns < 0 || rows > limit || columns > limit ||
        (columns && rows > (limit << 8) / columns) || left < 0 || width < 0 || width > columns || left > columns - width)
        return PyErr_SetString(PyExc_ValueError, "an unknown kind or an impossible shape"), NULL;
    const int64_t size = sizes[kind];
    if (take(data, &views[0], PyBUF_SIMPLE, rows * columns * size, 1, "data") && ++used &&
        take(places, &views[1], PyBUF_SIMPLE, 0, 8, "places") && ++used && few(views[1].len / 8, width) &&
        take(to, &views[2], PyBUF_WRITABLE, views[1].len / 8 * width * 4, 4, "to") && ++used &&
        (kind != BYTE || (take(table, &views[3], PyBUF_SIMPLE, 512, 2, "table") && ++used))) {
        const int64_t *place = views[1].buf, count = views[1].len / 8;
        int64_t i = 0;
        Py_BEGIN_ALLOW_THREADS
        for (; i < count && 0 <= place[i] && place[i] < rows; i++) {
            const char *from = (const char *)views[0].buf + (place[i] * columns + left) * size;
            float *row = (float *)views[2].buf + i * width;
            if (kind == BYTE)
                best.widen(row, (const uint8_t *)from, width, 0, views[3].buf);
            else
                best.convert[level_of(level)](kind, from, width, row);
        }
        Py_END_ALLOW_THREADS
        if (i == count)
            found = Py_NewRef(Py_None);
        else
            PyErr_Format(PyExc_ValueError, "there is no row %lld of %zd", (long long)place[i], rows);
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}

static PyObject *kernel_krylov(PyObject *self, PyObject *args)
{
    (void)self;
    int level, used = 0;
    Py_ssize_t rows, columns, steps;
    PyObject *block, *basis, *images, *found = NULL;
    Py_buffer views[3];
    if (!PyArg_ParseTuple(args, "OnnnOOi", &block, &rows, &columns, &steps, &basis, &images, &level))
        return NULL;
    const int64_t most = 1 << 20;
    if (rows < 0 || columns < 0 || steps < 0 || rows > most || columns > most || steps > most)
        return PyErr_SetString(PyExc_ValueError, "an impossible shape"), NULL;
    if (take(block, &views[0], PyBUF_SIMPLE, rows * columns * 4, 4, "block") && ++used &&
        take(basis, &views[1], PyBUF_WRITABLE, (steps + 1) * columns * 4, 4, "basis") && ++used &&
        take(images, &views[2], PyBUF_WRITABLE, steps * rows * 4, 4, "images") && ++used) {
        int64_t made;
        Py_BEGIN_ALLOW_THREADS
        made = best.krylov[level_of(level)](views[0].buf, rows, columns, steps, views[1].buf, views[2].buf);
        Py_END_ALLOW_THREADS
        found = PyLong_FromLongLong(made);
    }
    while (used)
        PyBuffer_Release(&views[--used]);
    return found;
}

static PyMethodDef methods[] = {
    {"measure", kernel_measure, METH_VARARGS, "See _kernel.pyi."},
    {"gather", kernel_gather, METH_VARARGS, "See _kernel.pyi."},
    {"krylov", kernel_krylov, METH_VARARGS, "See _kernel.pyi."},
    {"survey", kernel_survey, METH_VARARGS, "See _kernel.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_kernel", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__kernel(void)
{
    choose_best();
    PyObject *made = PyModule_Create(&module);
    if (made) {
        PyModule_AddIntConstant(made, "VERSION", VERSION);
        PyModule_AddIntConstant(made, "LEVELS", best.levels);
    }
    return made;
}
