/* What stands around int8_dot, on vectors of any width: the range of a row, its quantisation, and sums into results. The file that includes
 * this has included simd.h. */
#include "../table.h"

#include <stddef.h>

typedef uint8_t u8v __attribute__((vector_size(CLIPFT_LANES)));

/* Keeps a product from being fused with the sum that it goes into, which would spare it a rounding: ISAs have to agree. */
SIMD f32v rounded(f32v product)
{
#if defined(__aarch64__)
    __asm__("" : "+w"(product));
#elif CLIPFT_LANES == 16
    __asm__("" : "+v"(product));
#else
    __asm__("" : "+x"(product));
#endif
    return product;
}

/* Sum over the row of x - shift, or of its square. */
SIMD float shifted_sum(const float *x, int64_t n, float shift, const bool square)
{
    f32v sum[2] = {f32v_set(0.0F), f32v_set(0.0F)};
    int64_t j = 0;
    for (int k = 0; j + CLIPFT_LANES <= n; j += CLIPFT_LANES, k = !k) {
        const f32v v = f32v_load(x + j) - shift;
        sum[k] += square ? v * v : v;
    }
    if (j < n) {
        const f32v v = load_part(x + j, n - j, shift) - shift;
        sum[0] += square ? v * v : v;
    }
    return f32v_sum(sum[0] + sum[1]);
}

CLIPFT_TARGET void KERNEL(int8_row_norm)(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *out)
{
    const float mean = shifted_sum(x, n, 0.0F, false) / (float)n;
    const float inverse = 1.0F / sqrtf(shifted_sum(x, n, mean, true) / (float)n + eps);
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES)
        f32v_store(out + j, (f32v_load(x + j) - mean) * inverse * f32v_load(weight + j) + f32v_load(bias + j));
    if (j < n) {
        const f32v scaled = (load_part(x + j, n - j, mean) - mean) * inverse * load_part(weight + j, n - j, 0.0F);
        store_part(out + j, n - j, scaled + load_part(bias + j, n - j, 0.0F));
    }
}

CLIPFT_TARGET void KERNEL(int8_row_scale)(const float *x, int64_t n, const float *factor, float *out)
{
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES) f32v_store(out + j, f32v_load(x + j) * f32v_load(factor + j));
    if (j < n) store_part(out + j, n - j, load_part(x + j, n - j, 0.0F) * load_part(factor + j, n - j, 0.0F));
}

typedef struct ranges {
    f32v low, high, bad;
} ranges;

SIMD void widen(ranges *r, f32v v)
{
    r->low = f32v_min(v, r->low);
    r->high = f32v_max(v, r->high);
    r->bad += v * 0.0F;
}

CLIPFT_TARGET void KERNEL(int8_row_range)(const float *x, int64_t n, clipft_range *range)
{
    const ranges start = {f32v_set(range->low), f32v_set(range->high), f32v_set(0.0F)};
    ranges a = start, b = start; /* two chains hide the latency of one */
    int64_t j = 0;
    for (; j + 2 * CLIPFT_LANES <= n; j += 2 * CLIPFT_LANES) {
        widen(&a, f32v_load(x + j));
        widen(&b, f32v_load(x + j + CLIPFT_LANES));
    }
    for (; j < n; j += CLIPFT_LANES) widen(&a, j + CLIPFT_LANES <= n ? f32v_load(x + j) : load_part(x + j, n - j, 0.0F));
    range->low = -f32v_max_lane(-f32v_min(a.low, b.low));
    range->high = f32v_max_lane(f32v_max(a.high, b.high));
    range->bad += f32v_sum(a.bad + b.bad);
}

/* The low byte of each lane. gcc takes AVX2's lanes out one by one. */
SIMD u8v low_bytes(i32v v)
{
#if defined(__x86_64__) && CLIPFT_LANES == 8
    const __m256i halves = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    u8v bytes;
    memcpy(&bytes, &both, sizeof bytes);
    return bytes;
#else
    return __builtin_convertvector(v, u8v);
#endif
}

SIMD u8v quantize_step(f32v x, float inverse, int32_t zero)
{
    const f32v least = f32v_set(12582912.0F - (float)zero); /* of 1.5 * 2^23 and a product the low bits are the rounded product */
    const f32v shifted = f32v_max(f32v_min(rounded(x * inverse) + 12582912.0F, least + 127.0F), least);
    return low_bytes((i32v)shifted - (0x4b400000 - zero));
}

CLIPFT_TARGET void KERNEL(int8_row_quantize)(const float *x, int64_t n, float inverse, int32_t zero, uint8_t *q)
{
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES) {
        const u8v level = quantize_step(f32v_load(x + j), inverse, zero);
        memcpy(q + j, &level, sizeof level);
    }
    if (j < n) {
        const u8v level = quantize_step(load_part(x + j, n - j, 0.0F), inverse, zero);
        memcpy(q + j, &level, (size_t)(n - j));
    }
}

SIMD u8v code_step(f32v x, float scale)
{
    const f32v shifted = x / scale + 12582912.0F; /* as above */
    return low_bytes((i32v)shifted - 0x4b400000);
}

CLIPFT_TARGET void KERNEL(int8_row_codes)(const float *x, int64_t n, float scale, int8_t *q)
{
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES) {
        const u8v codes = code_step(f32v_load(x + j), scale);
        memcpy(q + j, &codes, sizeof codes);
    }
    if (j < n) {
        const u8v codes = code_step(load_part(x + j, n - j, 0.0F), scale);
        memcpy(q + j, &codes, (size_t)(n - j));
    }
}

SIMD f32v quick_gelu(f32v x) { return f32v_gated(x, x * CLIPFT_QUICK_GELU_EXPONENT); }

/* By -sqrt(8 / pi) log2(e) (x + 0.044715 x^3), of terms of one sign, which five roundings move by 5 u of it. */
SIMD f32v gelu_tanh(f32v x) { return f32v_gated(x, x * (x * x * -0.102943240F - 2.30220819F)); }

/* x Phi(x), Phi(-|x|) = erfc(|x| / sqrt 2) / 2 by Abramowitz and Stegun 7.1.26, which errs by less than 1.5e-7. */
SIMD f32v gelu(f32v x)
{
    const f32v size = f32v_select(x < 0.0F, -x, x);
    const f32v t = 1.0F / (size * 0.231641888F + 1.0F);
    f32v p = t * 0.5307027145F - 0.7265760135F;
    p = p * t + 0.7107068705F;
    p = p * t - 0.142248368F;
    p = p * t + 0.127414796F;
    const f32v tail = p * t * f32v_exp(size * size * -0.5F);
    return f32v_zero_where(x < -14.0F, x * f32v_select(x < 0.0F, tail, 1.0F - tail)); /* not NaN for -Inf */
}

SIMD f32v finish_step(const clipft_int8_finish *f, const int32_t *sums, int64_t i, int64_t j)
{
    const u32v sum = (u32v)i32v_load(sums + i * CLIPFT_INT8_COLS + j) - (u32v)i32v_load(f->col_sum + j) * (uint32_t)f->row_zero[i];
    const f32v scaled = __builtin_convertvector((i32v)sum, f32v) * f32v_load(f->col_scale + j);
    return scaled * f->row_scale[i] + f32v_load(f->bias + j);
}

SIMD void finish_rows(const clipft_activation activation, const clipft_int8_finish *f, const int32_t *sums)
{
    for (int64_t i = 0; i < f->rows; ++i)
        for (int64_t j = 0; j < f->cols; j += CLIPFT_LANES) {
            float *out = f->out + i * f->out_stride + j;
            f32v v = finish_step(f, sums, i, j);
            if (activation == CLIPFT_QUICK_GELU) v = quick_gelu(v);
            if (activation == CLIPFT_GELU) v = gelu(v);
            if (activation == CLIPFT_GELU_TANH) v = gelu_tanh(v);
            const float *residual = f->residual ? f->residual + i * f->residual_stride + j : NULL;
            if (j + CLIPFT_LANES <= f->cols)
                f32v_store(out, residual ? v + f32v_load(residual) : v);
            else
                store_part(out, f->cols - j, residual ? v + load_part(residual, f->cols - j, 0.0F) : v);
        }
}

CLIPFT_TARGET void KERNEL(int8_finish)(const clipft_int8_finish *finish, const int32_t *sums)
{
    const clipft_int8_finish f = *finish;
    if (f.activation == CLIPFT_QUICK_GELU)
        finish_rows(CLIPFT_QUICK_GELU, &f, sums);
    else if (f.activation == CLIPFT_GELU)
        finish_rows(CLIPFT_GELU, &f, sums);
    else if (f.activation == CLIPFT_GELU_TANH)
        finish_rows(CLIPFT_GELU_TANH, &f, sums);
    else
        finish_rows(CLIPFT_NO_ACTIVATION, &f, sums);
}
