#if defined(__x86_64__)
#include "../common/isa_avx512.h"
#include "lora_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
