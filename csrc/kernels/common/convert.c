/* 16-bit floats to float32 and back, branch-free so that compilers vectorise them. */
#include "convert.h"

#include <string.h>

static inline float from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t to_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

void clipft_bfloat16_to_float(const uint16_t *src, float *dst, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) dst[i] = from_bits((uint32_t)src[i] << 16);
}

void clipft_float_to_bfloat16(const float *src, uint16_t *dst, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t u = to_bits(src[i]);
        const uint32_t rounded = (u + 0x7fffU + ((u >> 16) & 1U)) >> 16;
        dst[i] = (uint16_t)((u & 0x7fffffffU) > 0x7f800000U ? (u >> 16) | 0x40U : rounded); /* a NaN stays one, and quiet */
    }
}

void clipft_float16_to_float(const uint16_t *src, float *dst, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t sign = (uint32_t)(src[i] & 0x8000U) << 16, magnitude = (uint32_t)(src[i] & 0x7fffU);
        /* Denormals are counts of 2^-24: never by way of a float32 denormal, which a thread may flush to zero. */
        const uint32_t denormal = to_bits((float)(int32_t)magnitude * 0x1p-24F);
        const uint32_t finite = magnitude < 0x400U ? denormal : (magnitude << 13) + (112U << 23);
        dst[i] = from_bits(sign | (magnitude >= 0x7c00U ? 0x7f800000U | (magnitude << 13) : finite));
    }
}

void clipft_float_to_float16(const float *src, uint16_t *dst, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t u = to_bits(src[i]), sign = (u >> 16) & 0x8000U, magnitude = u & 0x7fffffffU;
        const uint32_t normal = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
        /* Adding 0.5 aligns a denormal's bits with float32's lowest ones and rounds to nearest even. */
        const uint32_t denormal = to_bits(from_bits(magnitude) + 0.5F) - to_bits(0.5F);
        uint32_t h = magnitude < (113U << 23) ? denormal : normal;
        h = magnitude >= 0x477ff000U ? 0x7c00U : h;                               /* 65520 and more round to infinity */
        h = magnitude > 0x7f800000U ? 0x7e00U | ((magnitude >> 13) & 0x3ffU) : h; /* NaN */
        dst[i] = (uint16_t)(sign | h);
    }
}
