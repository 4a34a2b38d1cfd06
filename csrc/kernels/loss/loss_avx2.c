#if defined(__x86_64__)
#include "../common/isa_avx2.h"
#include "loss_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
