#if defined(__x86_64__)
#define CLIPFT_ISA avx2
#define CLIPFT_LANES 8
#define CLIPFT_TARGET __attribute__((target("avx2,fma")))
#define ATTEND_ROWS 4
#define ATTEND_PANELS 1
#include "attention_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
