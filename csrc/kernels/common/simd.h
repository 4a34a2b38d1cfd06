/* Float vectors and their functions, written once for every width. The file that includes this has included its tier's isa_<isa>.h, or
 * defines
 *   CLIPFT_ISA     the suffix of its functions' names
 *   CLIPFT_LANES   floats in a vector
 *   CLIPFT_TARGET  __attribute__((target(...))) of the ISA, or nothing; every function that handles vectors carries it, because a compiler
 * lowers wide vectors to narrow ones wherever the target is missing, even in what is inlined later. */
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define KERNEL(name) JOIN(clipft_##name, CLIPFT_ISA)

#define SIMD static inline __attribute__((always_inline)) CLIPFT_TARGET

typedef float f32v __attribute__((vector_size(4 * CLIPFT_LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * CLIPFT_LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * CLIPFT_LANES)));

SIMD f32v f32v_load(const float *p)
{
    f32v v;
    memcpy(&v, p, sizeof v);
    return v;
}

SIMD i32v i32v_load(const int32_t *p)
{
    i32v v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* 0, 1, 2, ... */
SIMD i32v i32v_iota(void)
{
    int32_t lane[CLIPFT_LANES];
    for (int k = 0; k < CLIPFT_LANES; ++k) lane[k] = k;
    return i32v_load(lane);
}

SIMD void f32v_store(float *p, f32v v) { memcpy(p, &v, sizeof v); }

SIMD f32v f32v_set(float a) { return a - (f32v){0}; } /* not + 0, which would turn -0 into 0 and so costs an addition */

/* mask ? a : b; a mask's lanes are 0 or -1. */
SIMD f32v f32v_select(i32v mask, f32v a, f32v b) { return (f32v)((mask & (i32v)a) | (~mask & (i32v)b)); }

SIMD f32v f32v_zero_where(i32v mask, f32v a) { return (f32v)(~mask & (i32v)a); }

/* a > b ? a : b and a < b ? a : b, lane by lane: so b where either is NaN. Compilers do not see x86's single instructions in the selection.
 */
#if defined(__x86_64__) && CLIPFT_LANES == 16
SIMD f32v f32v_max(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
SIMD f32v f32v_min(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__x86_64__) && CLIPFT_LANES == 8
SIMD f32v f32v_max(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
SIMD f32v f32v_min(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
#else
SIMD f32v f32v_max(f32v a, f32v b) { return f32v_select(a > b, a, b); }
SIMD f32v f32v_min(f32v a, f32v b) { return f32v_select(a < b, a, b); }
#endif

/* The first n lanes from p, the rest `fill`: a row's last, partial vector, read and written without touching what lies beyond it. */
SIMD f32v load_part(const float *p, int64_t n, float fill)
{
    float lane[CLIPFT_LANES];
    for (int k = 0; k < CLIPFT_LANES; ++k) lane[k] = fill;
    memcpy(lane, p, (size_t)n * sizeof *p);
    return f32v_load(lane);
}

SIMD void store_part(float *p, int64_t n, f32v v)
{
    float lane[CLIPFT_LANES];
    f32v_store(lane, v);
    memcpy(p, lane, (size_t)n * sizeof *p);
}

/* What a vector is reduced by: a chain through all lanes would take as long as a short row's work. */
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

SIMD float f32v_sum(f32v v)
{
    f32x4 part[CLIPFT_LANES / 4], sum;
    memcpy(part, &v, sizeof v);
    sum = part[0];
    UNROLL for (int k = 1; k < CLIPFT_LANES / 4; ++k) sum += part[k];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* The greatest lane; none is NaN. */
SIMD float f32v_max_lane(f32v v)
{
    f32x4 part[CLIPFT_LANES / 4], max;
    memcpy(part, &v, sizeof v);
    max = part[0];
    UNROLL for (int k = 1; k < CLIPFT_LANES / 4; ++k)
    {
        const i32x4 more = part[k] > max;
        max = (f32x4)((more & (i32x4)part[k]) | (~more & (i32x4)max));
    }
    const float a = max[0] > max[2] ? max[0] : max[2], b = max[1] > max[3] ? max[1] : max[3];
    return a > b ? a : b;
}

/* exp(x) for x <= 88 to 1.1 ulp; 0 where the result would be denormal; NaN stays NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by the polynomial of Cephes' expf; times 2^n. Adding 1.5 * 2^23 + 127 rounds to an integer
 * and leaves n + 127, the exponent of 2^n, in the low bits. */
SIMD f32v f32v_exp(f32v x)
{
    const f32v magic = f32v_set(12583039.0F);
    const f32v shifted = x * 1.44269504088896341F + magic;
    const f32v n = shifted - magic;
    f32v r = x - n * 0.693359375F;
    r = r - n * -2.12194440e-4F;
    f32v p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * (r * r) + (r + 1.0F);
    return f32v_zero_where(x < -87.3365402F, p * (f32v)((u32v)shifted << 23));
}

/* 2^t for -126 <= t < 127 within an ulp: 2^n p(t - n), n the nearest integer, put into the exponent, p the polynomial of Cephes' exp2f. */
SIMD f32v f32v_exp2(f32v t)
{
    const f32v magic = f32v_set(12582912.0F); /* 1.5 * 2^23 */
    const f32v shifted = t + magic;
    const f32v f = t - (shifted - magic);
    f32v p = f * 1.535336188e-4F + 1.339887440e-3F;
    p = p * f + 9.618437358e-3F;
    p = p * f + 5.550332471e-2F;
    p = p * f + 2.402264791e-1F;
    p = p * f + 6.931472029e-1F;
    p = p * f + 1.0F;
    return (f32v)((u32v)p + ((u32v)shifted << 23));
}

/* x / (1 + 2^t), 0 from t = 126 on, also of -Inf. */
SIMD f32v f32v_gated(f32v x, f32v t) { return f32v_zero_where(t > 126.0F, x / (f32v_exp2(f32v_max(f32v_set(-126.0F), t)) + 1.0F)); }

/* sigmoid(1.702 x) is 1 / (1 + 2^(this x)), of whose exponent two roundings move it by 2 u. */
#define CLIPFT_QUICK_GELU_EXPONENT (-2.45546696F)

/* log(1 + x) for 0 <= x <= 1: 2 atanh(u) with u = x / (2 + x) <= 1/3; the series' next term is below 2e-8 of the result. */
SIMD f32v f32v_log1p(f32v x)
{
    const f32v u = x / (x + 2.0F);
    const f32v w = u * u;
    f32v p = w * (1.0F / 13.0F) + (1.0F / 11.0F);
    p = p * w + (1.0F / 9.0F);
    p = p * w + (1.0F / 7.0F);
    p = p * w + (1.0F / 5.0F);
    p = p * w + (1.0F / 3.0F);
    return 2.0F * u + 2.0F * u * w * p;
}
