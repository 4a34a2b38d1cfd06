/* What this CPU and its operating system support, as tiers that kernels are written for, weakest first. The tiers of int8 dot products have
 * rows of their own for int8 products only; every other kernel takes the tier's below. */
#ifndef CLIPFT_CPU_H
#define CLIPFT_CPU_H

#include <stdbool.h>

typedef enum clipft_isa {
    CLIPFT_ISA_REF,         /* plain C, every CPU */
    CLIPFT_ISA_NEON,        /* aarch64 baseline */
    CLIPFT_ISA_NEON_DOT,    /* and the int8 dot products of FEAT_DotProd */
    CLIPFT_ISA_NEON_I8MM,   /* and the int8 matrix products of FEAT_I8MM */
    CLIPFT_ISA_AVX2,        /* AVX2, FMA */
    CLIPFT_ISA_AVX_VNNI,    /* and the int8 dot products of AVX-VNNI */
    CLIPFT_ISA_AVX512,      /* AVX-512 F, BW, DQ, VL */
    CLIPFT_ISA_AVX512_VNNI, /* and the int8 dot products of AVX-512 VNNI */
    CLIPFT_ISA_AMX,         /* and the int8 tiles of AMX, which Linux hands out */
    CLIPFT_ISA_COUNT
} clipft_isa;

const char *clipft_isa_name(clipft_isa isa);
bool clipft_cpu_has(clipft_isa isa);

/* An x86-64 of AMD's: MKL, torch's GEMM, keeps it off its AVX-512 path, and reaches four fifths of its float32 peak. */
bool clipft_cpu_is_amd(void);

#endif
