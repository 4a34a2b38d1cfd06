/* The torch-free half of clipft: micro-kernels (innermost loops, one per ISA) and the drivers that tile and thread them, a folder a family.
 * Nothing below includes Python or torch.
 *
 * This joins the families' slots into the table of the micro-kernels in use. A micro-kernel is named by its row of kernels.inc,
 *
 *   clipft_<family>_<slot>_<isa>     clipft_lora_row_quick_gelu_grad_avx512
 *
 * and its type is its slot's, so that its prototype is written nowhere. A slot is [<operand>_]<operation>[_<variant>]: the operand is what
 * a call works on, `row` (of a tile or a matrix), `block` (of rows and columns) or `rank` (a product with the rank on one side); a family
 * whose calls all work on the same has none. */
#ifndef CLIPFT_TABLE_H
#define CLIPFT_TABLE_H

#include "attention/attention_kernels.h"
#include "common/gemm_kernels.h"
#include "int8/int8_kernels.h"
#include "lora/lora_kernels.h"
#include "loss/loss_kernels.h"

typedef struct clipft_kernels {
    clipft_loss_kernels loss;
    clipft_gemm_kernels gemm;
    clipft_lora_kernels lora;
    clipft_int8_kernels int8;
    clipft_attention_kernels attention;
} clipft_kernels;

extern clipft_kernels clipft_kernel_table; /* filled by dispatch.c */

#define CLIPFT_KERNEL(family, slot, tier, isa) extern __typeof__(*clipft_kernel_table.family.slot) clipft_##family##_##slot##_##isa;
#include "kernels.inc"
#undef CLIPFT_KERNEL

#endif
