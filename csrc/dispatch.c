#include "dispatch.h"

#include "kernels/attention/attention_kernels.h"
#include "kernels/common/gemm_kernels.h"
#include "kernels/int8/int8_kernels.h"
#include "kernels/lora/lora_kernels.h"
#include "kernels/loss/loss_kernels.h"

clipft_kernels clipft_kernel_table;

static clipft_isa current = CLIPFT_ISA_REF;
static bool own_gemm;
static clipft_isa in_use[CLIPFT_SLOT_COUNT];

clipft_isa clipft_dispatch_isa(void) { return current; }

bool clipft_dispatch_own_gemm(void) { return own_gemm; }

void clipft_dispatch(clipft_isa limit)
{
    current = limit;
    own_gemm = limit >= CLIPFT_ISA_AVX512 && clipft_cpu_is_amd();
    /* Rows are ordered weakest first, so the last one that may run wins. */
#define KERNEL(slot, isa, function)                                                                                                        \
    if (CLIPFT_ISA_##isa <= limit && clipft_cpu_has(CLIPFT_ISA_##isa)) {                                                                   \
        clipft_kernel_table.slot = function;                                                                                               \
        in_use[CLIPFT_SLOT_##slot] = CLIPFT_ISA_##isa;                                                                                     \
    }
#include "kernels.inc"
#undef KERNEL
}

const char *clipft_dispatch_slot(int slot, clipft_isa *isa)
{
#define SLOT(name) #name,
    static const char *const names[] = {CLIPFT_KERNEL_SLOTS(SLOT)};
#undef SLOT
    *isa = in_use[slot];
    return names[slot];
}
