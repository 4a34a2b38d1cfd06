#if defined(__x86_64__)
#include "isa_avx2.h"
#define GEMM_ROWS 6
#define GEMM_PANELS 1
#include "gemm_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
