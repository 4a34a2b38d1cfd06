#if defined(__aarch64__)
#include "isa_neon.h"
#define GEMM_ROWS 6
#define GEMM_PANELS 1
#include "gemm_simd.h"
#else
typedef int clipft_not_aarch64; /* ISO C forbids an empty file */
#endif
