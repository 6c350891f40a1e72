/* What the pass needs of a vector unit. Included once for every instruction set, whose name is SET.

   vf holds LANES floats, vd half as many doubles, vm a mask of LANES. Operators of GCC's and Clang's vector types do the rest. */

#if LANES == 16 /* AVX-512 */

typedef __m512 N(vf);
typedef __m512d N(vd);
typedef __m512i N(vi);
typedef __mmask16 N(vm);

INLINE __m512 N(load_float32)(const char *p) { return _mm512_loadu_ps(p); }
INLINE __m512 N(load_bfloat16)(const char *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE __m512 N(load_float16)(const char *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512 N(load_some)(const int kind, const char *p, int64_t n, __mmask16 there)
{
    (void)n;
    if (kind == FLOAT32)
        return _mm512_maskz_loadu_ps(there, p);
    const __m256i half = _mm256_maskz_loadu_epi16(there, p);
    return kind == FLOAT16 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE __m512d N(lower)(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
INLINE __m512d N(upper)(__m512 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
INLINE __m512d N(folded)(__m512 x)
{
    return _mm512_cvtps_pd(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
INLINE double N(sum)(__m512d x) { return _mm512_reduce_add_pd(x); }
INLINE __m512 N(least)(__m512 x, __m512 y) { return _mm512_min_ps(x, y); }
INLINE __m512 N(most)(__m512 x, __m512 y) { return _mm512_max_ps(x, y); }
/* Of those lanes of x that are there. */
INLINE __m512 N(least_of)(__mmask16 there, __m512 x, __m512 y) { return _mm512_mask_min_ps(y, there, x, y); }
INLINE __m512 N(most_of)(__mmask16 there, __m512 x, __m512 y) { return _mm512_mask_max_ps(y, there, x, y); }
/* The sums of four vectors and of four others, put together two by two. */
INLINE void N(sums_of_four)(const __m512d x[4], const __m512d y[4], double *to, double *other)
{
    const __m512d *from[4] = {x, x + 2, y, y + 2};
    __m512d two[4], four[2];
    for (int i = 0; i < 4; i++)
        two[i] = _mm512_unpacklo_pd(from[i][0], from[i][1]) + _mm512_unpackhi_pd(from[i][0], from[i][1]);
    for (int i = 0; i < 2; i++)
        four[i] = _mm512_shuffle_f64x2(two[2 * i], two[2 * i + 1], 0x88) + _mm512_shuffle_f64x2(two[2 * i], two[2 * i + 1], 0xdd);
    const __m512d all = _mm512_shuffle_f64x2(four[0], four[1], 0x88) + _mm512_shuffle_f64x2(four[0], four[1], 0xdd);
    _mm256_storeu_pd(to, _mm512_castpd512_pd256(all));
    _mm256_storeu_pd(other, _mm512_extractf64x4_pd(all, 1));
}
INLINE float N(lowest)(__m512 x) { return _mm512_reduce_min_ps(x); }
INLINE float N(highest)(__m512 x) { return _mm512_reduce_max_ps(x); }
INLINE __m512i N(count_zeros)(__m512i count, __m512 x)
{
    return _mm512_mask_add_epi32(count, _mm512_cmpeq_ps_mask(x, _mm512_setzero_ps()), count, _mm512_set1_epi32(1));
}
INLINE __mmask16 N(first)(int64_t n) { return (__mmask16)(n < 16 ? (1u << n) - 1 : 0xffffu); }
INLINE __mmask16 N(both)(__mmask16 a, __mmask16 b) { return a & b; }
INLINE __mmask16 N(below)(__m512 x, __m512 y) { return _mm512_cmp_ps_mask(_mm512_abs_ps(x), y, _CMP_LT_OQ); }
INLINE __mmask16 N(unequal)(__m512 x, __m512 y) { return _mm512_cmp_ps_mask(x, y, _CMP_NEQ_UQ); }
INLINE int64_t N(number)(__mmask16 m) { return __builtin_popcount(m); }
INLINE __m512 N(choose)(__mmask16 m, __m512 x, __m512 y) { return _mm512_mask_blend_ps(m, y, x); }

#elif LANES == 8 /* AVX2 with FMA and F16C */

typedef __m256 N(vf);
typedef __m256d N(vd);
typedef __m256i N(vi);
typedef __m256 N(vm);

INLINE __m256 N(load_float32)(const char *p) { return _mm256_loadu_ps((const float *)p); }
INLINE __m256 N(load_bfloat16)(const char *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE __m256 N(load_float16)(const char *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE __m256d N(lower)(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
INLINE __m256d N(upper)(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
INLINE __m256d N(folded)(__m256 x)
{
    return _mm256_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
INLINE double N(sum)(__m256d x)
{
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
INLINE __m256 N(least)(__m256 x, __m256 y) { return _mm256_min_ps(x, y); }
INLINE __m256 N(most)(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }
INLINE __m256i N(count_zeros)(__m256i count, __m256 x)
{
    return _mm256_sub_epi32(count, _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ)));
}
INLINE __m256 N(first)(int64_t n)
{
    __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? (int)n : 8), place));
}
INLINE __m256 N(both)(__m256 a, __m256 b) { return _mm256_and_ps(a, b); }
INLINE __m256 N(below)(__m256 x, __m256 y)
{
    return _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), y, _CMP_LT_OQ);
}
INLINE __m256 N(unequal)(__m256 x, __m256 y) { return _mm256_cmp_ps(x, y, _CMP_NEQ_UQ); }
INLINE int64_t N(number)(__m256 m) { return __builtin_popcount((unsigned)_mm256_movemask_ps(m)); }
INLINE __m256 N(choose)(__m256 m, __m256 x, __m256 y) { return _mm256_blendv_ps(y, x, m); }

#else /* four lanes, and the compiler knows how: SSE2, NEON or none */

typedef float N(vf) __attribute__((vector_size(16), may_alias));
typedef double N(vd) __attribute__((vector_size(16), may_alias));
typedef int32_t N(vi) __attribute__((vector_size(16), may_alias));
typedef N(vi) N(vm);

INLINE N(vf) N(load_float32)(const char *p)
{
    N(vf) x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE N(vi) N(load_words)(const char *p)
{
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return (N(vi)){h[0], h[1], h[2], h[3]};
}
INLINE N(vf) N(load_bfloat16)(const char *p) { return (N(vf))(N(load_words)(p) << 16); }
INLINE N(vf) N(load_float16)(const char *p)
{
    N(vi) w = N(load_words)(p);
    N(vi) magnitude = w & 0x7fff, sign = (w & 0x8000) << 16;
    /* The fraction and the exponent go where a float32 has its own, whose bias is 112 more; without a leading one they are
       a multiple of the smallest number. */
    N(vi) normal = (magnitude << 13) + (112 << 23), special = magnitude >= 0x7c00, tiny = magnitude < 0x400;
    N(vf) small = __builtin_convertvector(magnitude, N(vf)) * 0x1p-24f;
    return (N(vf))(sign | (tiny & (N(vi))small) | (~tiny & (normal | (special & 0x7f800000))));
}
INLINE N(vd) N(lower)(N(vf) x) { return (N(vd)){x[0], x[1]}; }
INLINE N(vd) N(upper)(N(vf) x) { return (N(vd)){x[2], x[3]}; }
INLINE N(vd) N(folded)(N(vf) x) { return (N(vd)){x[0] + x[2], x[1] + x[3]}; }
INLINE double N(sum)(N(vd) x) { return x[0] + x[1]; }
INLINE N(vf) N(choose)(N(vi) m, N(vf) x, N(vf) y) { return (N(vf))((m & (N(vi))x) | (~m & (N(vi))y)); }
INLINE N(vf) N(least)(N(vf) x, N(vf) y) { return N(choose)(x < y, x, y); }
INLINE N(vf) N(most)(N(vf) x, N(vf) y) { return N(choose)(x > y, x, y); }
INLINE N(vi) N(count_zeros)(N(vi) count, N(vf) x) { return count - (x == 0); }
INLINE N(vi) N(first)(int64_t n) { return (N(vi)){0, 1, 2, 3} < (int32_t)(n < 4 ? n : 4); }
INLINE N(vi) N(both)(N(vi) a, N(vi) b) { return a & b; }
INLINE N(vi) N(below)(N(vf) x, N(vf) y) { return (N(vf))((N(vi))x & 0x7fffffff) < y; }
INLINE N(vi) N(unequal)(N(vf) x, N(vf) y) { return x != y; }
INLINE int64_t N(number)(N(vi) m) { return -(int64_t)(m[0] + m[1] + m[2] + m[3]); }

#endif

INLINE N(vf) N(all)(float value) { return (N(vf)){0} + value; }
INLINE N(vf) N(load)(const int kind, const char *p)
{
    return kind == FLOAT32 ? N(load_float32)(p) : kind == FLOAT16 ? N(load_float16)(p) : N(load_bfloat16)(p);
}

INLINE int64_t N(counted)(N(vi) counts)
{
#if LANES == 16
    const __m512i odd = _mm512_srli_epi64(counts, 32), even = _mm512_maskz_mov_epi32(0x5555, counts);
    return _mm512_reduce_add_epi64(_mm512_add_epi64(odd, even));
#else
    uint32_t each[LANES];
    int64_t total = 0;
    memcpy(each, &counts, sizeof each);
    for (int i = 0; i < LANES; i++)
        total += each[i];
    return total;
#endif
}

#if LANES < 16
INLINE N(vf) N(least_of)(N(vm) there, N(vf) x, N(vf) y) { return N(least)(N(choose)(there, x, N(all)(INFINITY)), y); }
INLINE N(vf) N(most_of)(N(vm) there, N(vf) x, N(vf) y) { return N(most)(N(choose)(there, x, N(all)(-INFINITY)), y); }
INLINE void N(sums_of_four)(const N(vd) x[4], const N(vd) y[4], double *to, double *other)
{
    for (int i = 0; i < 4; i++)
        to[i] = N(sum)(x[i]), other[i] = N(sum)(y[i]);
}
INLINE float N(lowest)(N(vf) x)
{
    float found = x[0];
    for (int i = 1; i < LANES; i++)
        found = x[i] < found ? x[i] : found;
    return found;
}
INLINE float N(highest)(N(vf) x) { return -N(lowest)(-x); }
/* There are no loads of a part of a vector of 16 bits. The first n values, those that `there` tells, and zeros. */
INLINE N(vf) N(load_some)(const int kind, const char *p, int64_t n, N(vm) there)
{
    char rest[4 * LANES] = {0};
    (void)there;
    return N(load)(kind, n < LANES ? memcpy(rest, p, (size_t)(n * (kind == FLOAT32 ? 4 : 2))) : p);
}
#endif
