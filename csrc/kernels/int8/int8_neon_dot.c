#if defined(__aarch64__)
#define CLIPFT_ISA neon_dot
#define CLIPFT_LANES 4
#if defined(__clang__)
#define CLIPFT_TARGET __attribute__((target("dotprod")))
#else
#define CLIPFT_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define INT8_ROWS 6
#define INT8_PANELS 1
#include <arm_neon.h>

#include "../common/simd.h"

SIMD i32v int8_dot4(i32v sum, i32v x, i32v w) { return (i32v)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w); }

#include "int8_dot_simd.h"
#else
typedef int clipft_not_aarch64; /* ISO C forbids an empty file */
#endif
