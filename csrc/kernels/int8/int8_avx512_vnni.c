#if defined(__x86_64__)
#define CLIPFT_ISA avx512_vnni
#define CLIPFT_LANES 16
#define CLIPFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
#define INT8_ROWS 6
#define INT8_PANELS 4
#include <immintrin.h>

#include "../common/simd.h"

SIMD i32v int8_dot4(i32v sum, i32v x, i32v w) { return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w); }

#include "int8_dot_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
