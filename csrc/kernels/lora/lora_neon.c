#if defined(__aarch64__)
#include "../common/isa_neon.h"
#include "lora_simd.h"
#else
typedef int clipft_not_aarch64; /* ISO C forbids an empty file */
#endif
