/* The contracts of the micro-kernels of int8 linear layers. Every ISA keeps them, with float rounding its own where nothing else is said.
 */
#ifndef CLIPFT_INT8_KERNELS_H
#define CLIPFT_INT8_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a row holds, gathered piece by piece; starts as zeros, so that 0 is in the range. */
typedef struct clipft_range {
    float low, high;
    float bad; /* NaN once a NaN or an infinity was seen, else 0 */
} clipft_range;

/* Weights lie in panels of CLIPFT_INT8_PANEL output channels. A tile takes CLIPFT_INT8_COLS channels and CLIPFT_INT8_ROWS rows at most. */
enum { CLIPFT_INT8_PANEL = 16, CLIPFT_INT8_COLS = 64, CLIPFT_INT8_ROWS = 32 };

/* Rows of a tile at best where an ISA has no reason for others: whole tiles of 4 and of 6. */
enum { CLIPFT_INT8_DOT_ROWS = 12 };

/* Operands of `multiply`. */
typedef struct clipft_int8_tile {
    const uint8_t *x; /* [rows, depth] 0 .. 127, rows x_stride apart */
    const int8_t *w;  /* [panels] as packed, w_stride apart */
    int64_t x_stride, w_stride;
    int64_t rows, panels, depth; /* depth a multiple of the slot's */
    const uint8_t *marks;        /* of panels, marks_stride apart */
    int64_t marks_stride;
    const int8_t *ahead; /* panels that are multiplied next, w_stride apart: asked for meanwhile */
    int64_t ahead_panels;
} clipft_int8_tile;

/* Weights as they are saved: element (j, k), of output channel j, lies at data[j * row_stride + k * col_stride]. */
typedef struct clipft_int8_weights {
    const int8_t *data;
    int64_t out, in, row_stride, col_stride;
} clipft_int8_weights;

/* How a panel lies in memory: what packed weights say of themselves, so the numbers stay.
 *   QUADS  [depth / 4][channel][4] */
typedef enum clipft_int8_layout { CLIPFT_INT8_QUADS } clipft_int8_layout;

/* The dot products of an ISA, with all that depends on how it multiplies. */
typedef struct clipft_int8_dot {
    clipft_int8_layout layout;
    int64_t depth; /* rows and panels are filled up to a multiple of this with zeros */
    int64_t rows;  /* of a tile at best: a multiple of what its registers hold, at most CLIPFT_INT8_ROWS */

    /* Writes a panel, up to CLIPFT_INT8_PANEL channels, into zeros, and adds each channel's weights to its sum. */
    void (*pack)(const clipft_int8_weights *w, int8_t *panel, int32_t *sums);

    /* The other way: a panel's `channels`, [channels, in], rows `in` apart. */
    void (*unpack)(const int8_t *panel, int64_t channels, int64_t in, int8_t *w);

    /* Marks, in zeros, what multiply may do otherwise with a panel: depths 8 i to 8 i + 7 in bit i. NULL: nothing. */
    void (*mark)(const int8_t *panel, int64_t depth, uint8_t *marks);

    /* sums[i][j] = sum_k x[i][k] * w[j][k], rows CLIPFT_INT8_COLS apart. Exact. */
    void (*multiply)(const clipft_int8_tile *tile, int32_t *sums);

    /* Called by a thread before its first tile and after its last, where multiply needs a state of the CPU; else NULL. */
    void (*enter)(void);
    void (*leave)(void);
} clipft_int8_dot;

/* The pack and unpack of CLIPFT_INT8_QUADS. */
void clipft_int8_pack_quads(const clipft_int8_weights *w, int8_t *panel, int32_t *sums);
void clipft_int8_unpack_quads(const int8_t *panel, int64_t channels, int64_t in, int8_t *w);

/* CLIPFT_GELU_TANH: x / (1 + exp(-sqrt(8 / pi) (x + 0.044715 x^3))), which is 0.5 x (1 + tanh(half of that)), as SigLIP has it. */
typedef enum clipft_activation {
    CLIPFT_NO_ACTIVATION,
    CLIPFT_QUICK_GELU,
    CLIPFT_GELU,
    CLIPFT_GELU_TANH,
    CLIPFT_ACTIVATIONS
} clipft_activation;

/* What turns sums into a layer's results. Everything of a column has room for CLIPFT_INT8_COLS. */
typedef struct clipft_int8_finish {
    const float *row_scale;  /* [rows] */
    const int32_t *row_zero; /* [rows] */
    const float *col_scale;  /* [cols] */
    const int32_t *col_sum;  /* [cols] */
    const float *bias;       /* [cols] */
    const float *residual;   /* [rows, cols], rows residual_stride apart, or NULL */
    float *out;              /* [rows, cols], rows out_stride apart; may be the residual */
    int64_t rows, cols, out_stride, residual_stride;
    clipft_activation activation;
} clipft_int8_finish;

typedef struct clipft_int8_kernels {
    /* out[j] = (x[j] - mean) / sqrt(variance + eps) * weight[j] + bias[j], mean and (biased) variance those of x; out may be x. */
    void (*row_norm)(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *out);

    /* out[j] = x[j] * factor[j], rounded: every ISA agrees; out may be x. */
    void (*row_scale)(const float *x, int64_t n, const float *factor, float *out);

    /* Widens the range to hold x. Exact: every ISA agrees. */
    void (*row_range)(const float *x, int64_t n, clipft_range *range);

    /* q[j] = clamp(round(x[j] * inverse) + zero, 0, 127), the product rounded to float32 and then to an integer, both to nearest even:
     * every ISA agrees bit for bit. |x[j] * inverse| < 2^21. */
    void (*row_quantize)(const float *x, int64_t n, float inverse, int32_t zero, uint8_t *q);

    /* q[j] = round(x[j] / scale), the quotient rounded to float32 and then to an integer, both to nearest even: every ISA agrees bit for
     * bit. |x[j] / scale| < 127.5. */
    void (*row_codes)(const float *x, int64_t n, float scale, int8_t *q);

    const clipft_int8_dot *dot;

    /* out[i][j] = activation((sums[i][j] - row_zero[i] * col_sum[j]) * col_scale[j] * row_scale[i] + bias[j]) + residual[i][j], the bracket
     * exact; where the activation tends to 0 it is 0, even of -Inf. */
    void (*finish)(const clipft_int8_finish *finish, const int32_t *sums);
} clipft_int8_kernels;

#endif
