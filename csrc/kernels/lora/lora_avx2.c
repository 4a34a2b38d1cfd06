#if defined(__x86_64__)
#define CLIPFT_ISA avx2
#define CLIPFT_LANES 8
#define CLIPFT_TARGET __attribute__((target("avx2,fma")))
#include "lora_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
