#if defined(__x86_64__)
#include "../common/isa_avx512.h"
#define INT8_ROWS 6
#define INT8_PANELS 4
#include <immintrin.h>

#include "../common/simd.h"

/* Pairs of products, at most 2 * 127 * 128, fit in 16 bits: nothing saturates. */
SIMD i32v int8_dot4(i32v sum, i32v x, i32v w)
{
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)x, (__m512i)w);
    return sum + (i32v)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}

#define INT8_PAIRED
SIMD i32v int8_dot8(i32v sum, const i32v x[2], const i32v w[2])
{
    const __m512i first = _mm512_maddubs_epi16((__m512i)x[0], (__m512i)w[0]), second = _mm512_maddubs_epi16((__m512i)x[1], (__m512i)w[1]);
    return sum + (i32v)_mm512_madd_epi16(_mm512_add_epi16(first, second), _mm512_set1_epi16(1));
}

#include "int8_dot_simd.h"
#include "int8_rows_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
