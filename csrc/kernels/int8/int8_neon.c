#if defined(__aarch64__)
#include "../common/isa_neon.h"
#define INT8_ROWS 4
#define INT8_PANELS 1
#include <arm_neon.h>

#include "../common/simd.h"

/* Sums of two products, at most 2 * 127 * 128, fit in 16 bits: nothing saturates. */
SIMD i32v int8_dot4(i32v sum, i32v x, i32v w)
{
    const int8x16_t a = (int8x16_t)x, b = (int8x16_t)w;
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return (i32v)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
}

#include "int8_dot_simd.h"
#include "int8_rows_simd.h"
#else
typedef int clipft_not_aarch64; /* ISO C forbids an empty file */
#endif
