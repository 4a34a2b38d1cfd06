#if defined(__x86_64__)
#define CLIPFT_ISA avx512
#define CLIPFT_LANES 16
#define CLIPFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define GEMM_ROWS 8
#define GEMM_PANELS 2
#include "gemm_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
