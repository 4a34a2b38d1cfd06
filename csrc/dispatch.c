#include "dispatch.h"

#include <stddef.h>

clipft_kernels clipft_kernel_table;

static clipft_isa current = CLIPFT_ISA_REF;
static bool own_gemm;

/* What is known of the slots, in the order of the table. */
static const char *names[CLIPFT_SLOT_COUNT];
static clipft_isa in_use[CLIPFT_SLOT_COUNT];

clipft_isa clipft_dispatch_isa(void) { return current; }

/* A bit for each tier that has a row. */
static unsigned compiled(void)
{
    unsigned tiers = 0;
#define CLIPFT_KERNEL(family, slot, tier, isa) tiers |= 1U << CLIPFT_ISA_##tier;
#include "kernels/kernels.inc"
#undef CLIPFT_KERNEL
    return tiers;
}

bool clipft_dispatch_can(clipft_isa isa) { return (compiled() >> isa & 1U) && clipft_cpu_has(isa); }

clipft_isa clipft_dispatch_best(void)
{
    int isa = CLIPFT_ISA_COUNT - 1;
    while (!clipft_dispatch_can((clipft_isa)isa)) --isa;
    return (clipft_isa)isa;
}

bool clipft_dispatch_own_gemm(void) { return own_gemm; }

void clipft_dispatch(clipft_isa limit)
{
    current = limit;
    own_gemm = limit >= CLIPFT_ISA_AVX512 && clipft_cpu_is_amd();
    /* Rows are ordered weakest first, so the last one that may run wins. */
#define CLIPFT_KERNEL(family, slot, tier, isa)                                                                                             \
    if (CLIPFT_ISA_##tier <= limit && clipft_cpu_has(CLIPFT_ISA_##tier)) {                                                                 \
        enum { INDEX = offsetof(clipft_kernels, family.slot) / sizeof(void *) };                                                           \
        clipft_kernel_table.family.slot = &clipft_##family##_##slot##_##isa;                                                               \
        names[INDEX] = #family "_" #slot;                                                                                                  \
        in_use[INDEX] = CLIPFT_ISA_##tier;                                                                                                 \
    }
#include "kernels/kernels.inc"
#undef CLIPFT_KERNEL
}

const char *clipft_dispatch_slot(int slot, clipft_isa *isa)
{
    *isa = in_use[slot];
    return names[slot];
}
