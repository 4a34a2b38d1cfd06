#if defined(__x86_64__)
#include "../common/isa_avx2.h"
#define INT8_ROWS 3
#define INT8_PANELS 1
#include <immintrin.h>

#include "../common/simd.h"

/* Pairs of products, at most 2 * 127 * 128, fit in 16 bits: nothing saturates. */
SIMD i32v int8_dot4(i32v sum, i32v x, i32v w)
{
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)w);
    return sum + (i32v)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#define INT8_PAIRED
SIMD i32v int8_dot8(i32v sum, const i32v x[2], const i32v w[2])
{
    const __m256i first = _mm256_maddubs_epi16((__m256i)x[0], (__m256i)w[0]), second = _mm256_maddubs_epi16((__m256i)x[1], (__m256i)w[1]);
    return sum + (i32v)_mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
}

#include "int8_dot_simd.h"
#include "int8_rows_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
