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

enum { VERSION = 4 }; /* of the functions: as in initaudit/measure/fused.py, which leaves one of another version alone */
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

/* The sum of words times odd numbers modulo 2^64, as in initaudit/measure/hashes.py; a last piece of a word ends in zeros.

   Of few words, where vectors take longer to set up than they save. */
INLINE uint64_t hash_short(const char *p, int64_t bytes, const uint64_t *odd)
{
    uint64_t total = 0, word;
#pragma GCC unroll 4
    for (; bytes >= 8; bytes -= 8, p += 8, odd++) {
        memcpy(&word, p, 8);
        __asm__("" : "+r"(word)); /* keeps the compiler from vectors */
        total += (word ^ (word >> 32)) * *odd;
    }
    if (bytes == 0)
        return total;
    /* What is left over, by halves: a copy of any length is a call. */
    uint32_t four = 0;
    uint16_t two = 0;
    int shift = 0;
    word = 0;
    if (bytes & 4)
        memcpy(&four, p, 4), word = four, shift = 32, p += 4;
    if (bytes & 2)
        memcpy(&two, p, 2), word |= (uint64_t)two << shift, shift += 16, p += 2;
    if (bytes & 1)
        word |= (uint64_t)(unsigned char)*p << shift;
    return total + (word ^ (word >> 32)) * *odd;
}

/* The same of a row of many words. */
INLINE uint64_t hash(const char *p, int64_t bytes, const uint64_t *odd)
{
    uint64_t total = 0, word;
    const int64_t whole = bytes / 8;
    for (int64_t i = 0; i < whole; i++) {
        memcpy(&word, p + 8 * i, 8);
        total += (word ^ (word >> 32)) * odd[i];
    }
    return total + hash_short(p + 8 * whole, bytes % 8, odd + whole);
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
    const double n = (double)(in->rows * in->columns - out->nan - out->inf), pilot = out->pilot, square = out->s1 * out->s1;
    if (!(out->low < out->high) || square <= FAR * FAR * (out->s2 * n - square))
        return 0;
    out->pilot = rounded(in, out->pilot + out->s1 / n);
    return out->pilot != pilot;
}

static void measure(const input *in, output *out, passer *pass)
{
    out->pilot = 0;
    if (in->rows * in->columns >= MANY) {
        output head = {0};
        input first = *in;
        first.row_sums = NULL, first.rows = 1, first.columns = HEAD;
        pass(&first, &head);
        if (better_pilot(&first, &head))
            out->pilot = head.pilot;
    }
    pass(in, out);
    if (better_pilot(in, out)) {
        input again = *in;
        again.row_sums = NULL;
        pass(&again, out);
    }
}

/* Sums of powers about the mean from those about the pilot: mean, m2, m3, m4, least, greatest; finite, zero, NaN and infinite. */
static void central(const input *in, const output *out, double numbers[6], int64_t counts[4])
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
        m2 = out->s2 - e * out->s1;
        m3 = out->s3 - 3 * e * out->s2 + 2 * e * e * out->s1;
        m4 = out->s4 - 4 * e * out->s3 + 6 * e * e * out->s2 - 3 * e * e * e * out->s1;
        m2 = m2 > 0 ? m2 : 0, m4 = m4 > 0 ? m4 : 0; /* rounding; and no number where a power left its range */
    }
    const double found[6] = {mean, m2, m3, m4, low, high};
    const int64_t counted[4] = {count, out->zeros, out->nan, out->inf};
    memcpy(numbers, found, sizeof found);
    memcpy(counts, counted, sizeof counted);
}

#include "calls.h"

static PyMethodDef methods[] = {
    {"measure", kernel_measure, METH_VARARGS, "See _kernel.pyi."},
    {"lay_out", kernel_lay_out, METH_VARARGS, "See _kernel.pyi."},
    {"measure_many", kernel_measure_many, METH_VARARGS, "See _kernel.pyi."},
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
