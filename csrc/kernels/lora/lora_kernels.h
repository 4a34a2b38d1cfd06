/* The contracts of the micro-kernels of LoRA and quick_gelu. Every ISA keeps them, with float rounding its own where nothing else is said.
 */
#ifndef CLIPFT_LORA_KERNELS_H
#define CLIPFT_LORA_KERNELS_H

#include <stdint.h>

/* Operands of rank_up. Rows of v lie CLIPFT_RANK_PAD-padded, the others `*_stride` apart. */
typedef struct clipft_rank_tile {
    const float *v;      /* [rows, padded] */
    const float *panel;  /* [rank, cols] */
    const float *init;   /* [rows, cols] what the products are added to; stride 0 repeats one row */
    float *out;          /* [rows, cols], may be init */
    const int32_t *mask; /* [rows, cols] -1 where products are added, 0 where they are not; or NULL: everywhere */
    int64_t rows, cols, rank, padded;
    int64_t panel_stride, init_stride, out_stride, mask_stride;
} clipft_rank_tile;

/* A row of v, [.., rank], is padded with zeros to a multiple of this. */
enum { CLIPFT_RANK_PAD = 16 };

/* What is read after the rows that a kernel works on, a row for each of them, or nothing (NULL). The kernel asks for it as it goes: rows of
 * a wide matrix lie too far apart, and the pieces of them in a block are too short, for the CPU to foresee. */
typedef struct clipft_ahead {
    const float *data;
    int64_t stride;
} clipft_ahead;

/* Which elements of a row are kept: bijective mixes of the column and the row's 64-bit key, compared with a threshold. */
#define CLIPFT_HASH_STEP 0x9e3779b9U
#define CLIPFT_HASH_MUL1 0x21f0aaadU
#define CLIPFT_HASH_MUL2 0xd35a2d97U

typedef struct clipft_dropout_row {
    uint32_t low, high; /* the row's key, see clipft_dropout_key */
    uint32_t col;       /* of x[0] */
    int32_t threshold;  /* kept where the element's hash, as a signed number, is at least this */
} clipft_dropout_row;

typedef struct clipft_lora_kernels {
    /* v[i][k] += sum_j x[i][j] * panel[j][k]; panel is [cols, padded], v [rows, padded]. */
    void (*rank_down)(const float *x, int64_t stride, int64_t rows, int64_t cols, const float *panel, int64_t padded, float *v,
                      clipft_ahead ahead);

    /* out[i][j] = init[i][j] + sum_k v[i][k] * panel[k][j], the sum 0 where the mask is. */
    void (*rank_up)(const clipft_rank_tile *tile);

    /* acc[k][j] += sum_i v[i][k] * x[i][j]; acc is [padded, cols] and cols a multiple of 16; rows of acc from `rank` on are left undefined.
     */
    void (*rank_outer)(const float *v, int64_t padded, int64_t rows, int64_t rank, const float *x, int64_t stride, int64_t cols, float *acc,
                       int64_t acc_stride, clipft_ahead ahead);

    /* mask[j] = -1 and out[j] = x[j] where the element is kept, else both are 0; out may be x. Integer arithmetic only: every ISA agrees
     * bit for bit. */
    void (*row_dropout)(const clipft_dropout_row *row, const float *x, float *out, int32_t *mask, int64_t n);

    /* out[j] = x[j] * sigmoid(1.702 * x[j]); out may be x. */
    void (*row_quick_gelu)(const float *x, float *out, int64_t n);

    /* out[j] = grad[j] * d quick_gelu(x[j]) / d x[j]; out may be either. */
    void (*row_quick_gelu_grad)(const float *x, const float *grad, float *out, int64_t n);
} clipft_lora_kernels;

#endif
