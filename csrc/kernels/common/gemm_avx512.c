#if defined(__x86_64__)
#include "isa_avx512.h"
#define GEMM_ROWS 8
#define GEMM_PANELS 2
#include "gemm_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
