/* Linear layers with int8 weights: y = act(x W^T + b), W = w diag(weight_scale), w int8 [out, in].
 *
 * Each row of x is brought to 7 bits at run time: q = round(x / scale) + zero in 0 .. 127, scale and zero such that the row's least and
 * greatest value, and 0, are levels. Then
 *
 *   y_ij = act(row_scale_i weight_scale_j (sum_k q_ik w_jk - zero_i sum_k w_jk) + b_j)
 *
 * with the bracket exact in 32 bits. Seven bits, not eight: AVX2 adds pairs of products in 16 bits, which eight bits would saturate, and
 * with seven every ISA gives the same sums. A row that holds a NaN or an infinity comes out NaN. */
#ifndef CLIPFT_INT8_H
#define CLIPFT_INT8_H

#include "../common/host.h"
#include "../common/views.h"
#include "int8_kernels.h"

/* in <= this: |sum_k q w| <= 127 * 128 * in < 2^31. out <= this: the size of packed weights is far from 2^63. */
enum { CLIPFT_INT8_MAX_IN = 131072, CLIPFT_INT8_MAX_OUT = 1 << 24 };

/* What stands before packed weights, which are panels in the layout of the dot products in use (clipft_int8_dot), [out / 16 rounded up],
 * then [out rounded up] int32 sums over in, and then the panels' marks, a bit to 8 of a panel's depth in whole bytes. */
typedef struct clipft_int8_header {
    int64_t magic, out, in, layout, unused[4]; /* 64 bytes keep the weights aligned */
} clipft_int8_header;

/* Bytes of the whole. */
int64_t clipft_int8_packed_size(int64_t out, int64_t in);

/* Packs the weights. False when the host failed. */
bool clipft_int8_pack(const clipft_host *host, const clipft_int8_weights *w, uint8_t *packed);

/* Codes [out, in], contiguous, of float32 weights [out, in] with column stride 1, and each channel's scale: its largest magnitude / 127,
 * but not denormal; 1 of a channel of zeros; NaN of one that holds a NaN or an infinity. False when the host failed. */
bool clipft_int8_quantize(const clipft_host *host, const clipft_view *w, int8_t *codes, float *scale);

/* The weights of such a whole, which clipft_int8_packed took: [out, in], contiguous. False when the host failed. */
bool clipft_int8_unpack(const clipft_host *host, const uint8_t *packed, int8_t *w);

/* Whether `size` bytes are such a whole, in that layout; its header. */
bool clipft_int8_packed(const uint8_t *packed, int64_t size, clipft_int8_header *header);

/* What lies in such a whole, and the bytes between its panels. */
const int8_t *clipft_int8_panels(const uint8_t *packed);
const uint8_t *clipft_int8_sums(const uint8_t *packed, int64_t out, int64_t panel_bytes); /* int32, perhaps not aligned */
const uint8_t *clipft_int8_marks(const uint8_t *packed, int64_t out, int64_t panel_bytes);
int64_t clipft_int8_panel_bytes(const clipft_int8_dot *dot, int64_t in);
int64_t clipft_int8_panel_marks(int64_t panel_bytes); /* bytes of a panel's marks */

typedef struct clipft_int8_layer {
    const uint8_t *packed;
    int64_t out, in;
    clipft_view scale; /* [1, out], or without data: 1 */
    clipft_view bias;  /* [1, out] or without data */
    clipft_activation activation;
} clipft_int8_layer;

enum { CLIPFT_INT8_LAYERS = 2 };

/* A product of small rank, v panel, as kernels/lora makes its operands. */
typedef struct clipft_int8_branch {
    const float *v;     /* [rows, padded], or NULL: none */
    const float *panel; /* [rank, out], rows panel_stride apart */
    int64_t rank, padded, panel_stride;
} clipft_int8_branch;

/* One layer or two in a row, and what stands before and behind them in a transformer's block or in training. */
typedef struct clipft_int8_chain {
    clipft_int8_layer layers[CLIPFT_INT8_LAYERS];
    int count;
    clipft_view norm_weight, norm_bias; /* [1, in] LayerNorm of the rows of x, or without data */
    float norm_eps;
    clipft_view factor;        /* [1, in] by which the rows of x are multiplied, or without data */
    bool quick_gelu;           /* which the rows of x pass */
    clipft_view residual;      /* [rows, out] added to the result, or without data */
    clipft_int8_branch branch; /* likewise; added last */
} clipft_int8_chain;

/* y [rows, out of the last layer] of x [rows, in]. False when memory ran out or the host failed. */
bool clipft_int8_run(const clipft_int8_chain *chain, const clipft_host *host, const clipft_view *x, const clipft_view *y);

#endif
