#if defined(__aarch64__)
#include "../common/isa_neon.h"
#define ATTEND_ROWS 6
#define ATTEND_PANELS 1
#include "attention_simd.h"

#include "attention_grad_simd.h"
#else
typedef int clipft_not_aarch64; /* ISO C forbids an empty file */
#endif
