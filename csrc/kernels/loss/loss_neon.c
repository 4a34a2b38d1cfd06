#if defined(__aarch64__)
#define CLIPFT_ISA neon
#define CLIPFT_LANES 4
#define CLIPFT_TARGET /* part of the baseline */
#include "loss_simd.h"
#else
typedef int clipft_not_aarch64; /* ISO C forbids an empty file */
#endif
