/* Declarations of the micro-kernel of attention.h. */
#ifndef CLIPFT_ATTENTION_KERNELS_H
#define CLIPFT_ATTENTION_KERNELS_H

#include "../kernels.h"

#define CLIPFT_DECLARE_ATTENTION_KERNELS(isa) void clipft_attend_##isa(const clipft_attend *head);

CLIPFT_DECLARE_ATTENTION_KERNELS(ref)
#if defined(__aarch64__)
CLIPFT_DECLARE_ATTENTION_KERNELS(neon)
#elif defined(__x86_64__)
CLIPFT_DECLARE_ATTENTION_KERNELS(avx2)
CLIPFT_DECLARE_ATTENTION_KERNELS(avx512)
#endif

#endif
