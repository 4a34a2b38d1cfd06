#if defined(__x86_64__)
#define CLIPFT_ISA avx_vnni
#define CLIPFT_LANES 8
#define CLIPFT_TARGET __attribute__((target("avx2,fma,avxvnni")))
#define INT8_ROWS 6
#define INT8_PANELS 1
#include <immintrin.h>

#include "../common/simd.h"

SIMD i32v int8_dot4(i32v sum, i32v x, i32v w) { return (i32v)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w); }

#include "int8_dot_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
