#if defined(__x86_64__)
#include "../common/isa_avx512.h"
#define ATTEND_ROWS 5
#define ATTEND_PANELS 4
#include "attention_simd.h"

#include "attention_grad_simd.h"
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
