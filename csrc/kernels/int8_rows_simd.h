/* What stands around int8_dot, on vectors of any width: the range of a row, its quantisation, and sums into results. The file that includes
 * this has included simd.h. */
#include "int8_kernels.h"

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

SIMD f32v f32v_min(f32v a, f32v b) { return f32v_select(a < b, a, b); }

CLIPFT_TARGET void KERNEL(row_range)(const float *x, int64_t n, clipft_range *range)
{
    f32v low = f32v_set(range->low), high = f32v_set(range->high), bad = f32v_set(0.0F);
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES) {
        const f32v v = f32v_load(x + j);
        low = f32v_min(v, low), high = f32v_max(v, high), bad += v * 0.0F;
    }
    if (j < n) {
        const f32v v = load_part(x + j, n - j, 0.0F);
        low = f32v_min(v, low), high = f32v_max(v, high), bad += v * 0.0F;
    }
    range->low = -f32v_max_lane(-low);
    range->high = f32v_max_lane(high);
    range->bad += f32v_sum(bad);
}

SIMD u8v quantize_step(f32v x, float inverse, int32_t zero)
{
    const f32v shifted = rounded(x * inverse) + 12582912.0F; /* 1.5 * 2^23: the low bits are the rounded product */
    i32v level = (i32v)shifted - (0x4b400000 - zero);
    level &= level > 0;
    level = ((level - 127) & (level < 127)) + 127;
    return __builtin_convertvector(level, u8v);
}

CLIPFT_TARGET void KERNEL(row_quantize)(const float *x, int64_t n, float inverse, int32_t zero, uint8_t *q)
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

/* x / (1 + exp(-1.702 x)); where the exponential would overflow, 0. */
SIMD f32v quick_gelu(f32v x)
{
    const f32v z = x * -1.702F;
    return f32v_zero_where(z > 88.0F, x / (f32v_exp(z) + 1.0F));
}

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
            if (j + CLIPFT_LANES <= f->cols)
                f32v_store(out, v);
            else
                store_part(out, f->cols - j, v);
        }
}

CLIPFT_TARGET void KERNEL(int8_finish)(const clipft_int8_finish *finish, const int32_t *sums)
{
    const clipft_int8_finish f = *finish;
    if (f.activation == CLIPFT_QUICK_GELU)
        finish_rows(CLIPFT_QUICK_GELU, &f, sums);
    else if (f.activation == CLIPFT_GELU)
        finish_rows(CLIPFT_GELU, &f, sums);
    else
        finish_rows(CLIPFT_NO_ACTIVATION, &f, sums);
}
