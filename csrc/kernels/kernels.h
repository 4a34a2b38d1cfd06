/* The torch-free half of clipft: micro-kernels (innermost loops, one per ISA) and the drivers that tile and thread them.
 *
 * Nothing below includes Python or torch. A driver reaches its host, which is torch in the extension and plain C in tests/c, through
 * clipft_host. Matrices are float32 and row-major where nothing else is said; sizes are int64_t; comments give shapes as [rows, cols]. */
#ifndef CLIPFT_KERNELS_H
#define CLIPFT_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

/* A view: element (i, j) lies at data[i * row_stride + j * col_stride]. */
typedef struct clipft_matrix {
    float *data;
    int64_t rows, cols, row_stride, col_stride;
} clipft_matrix;

static inline clipft_matrix clipft_transposed(clipft_matrix m)
{
    return (clipft_matrix){m.data, m.cols, m.rows, m.col_stride, m.row_stride};
}

/* Rows begin .. end - 1. */
static inline clipft_matrix clipft_rows(clipft_matrix m, int64_t begin, int64_t end)
{
    return (clipft_matrix){m.data + begin * m.row_stride, end - begin, m.cols, m.row_stride, m.col_stride};
}

/* What a driver needs from where it runs. Calls return false when the host failed. */
typedef struct clipft_host {
    /* c = a b, or c += a b. Uses all threads itself. */
    bool (*gemm)(clipft_matrix c, clipft_matrix a, clipft_matrix b, bool accumulate);
    /* Calls fn on sub-ranges that cover begin .. end - 1, of `grain` items or more, but for the last. */
    bool (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t begin, int64_t end, void *ctx), void *ctx);
    /* Sub-ranges that may run at once, at least 1. */
    int64_t (*threads)(void);
} clipft_host;

/* How a row of a tile becomes a row of d loss / d logits; see row_softmax_grad. */
typedef struct clipft_softmax_row {
    float scale; /* logits are scale * x */
    float lse;   /* the row's logsumexp, rounded to float32 */
    float own;   /* exp(lse - exact logsumexp): what rounding took away */
    float cross; /* factor that turns exp(logit - lse) * cross * col_factor[j] into exp(logit - column j's logsumexp) */
    float gain;  /* factor of the probabilities */
    float shift; /* subtracted from every element */
} clipft_softmax_row;

/* A column's logsumexp, split like the row's. */
typedef struct clipft_softmax_cols {
    const float *lse; /* [cols] */
    const float *own; /* [cols] */
} clipft_softmax_cols;

/* SLOT(name): the micro-kernels. Those of the losses work on a row of a tile of raw products x = <image_i, text_j>. Every ISA keeps the
 * contracts below, with float rounding its own. */
#define CLIPFT_KERNEL_SLOTS(SLOT)                                                                                                          \
    SLOT(row_max)                                                                                                                          \
    SLOT(row_exp_sum)                                                                                                                      \
    SLOT(block_col_lse)                                                                                                                    \
    SLOT(row_softmax_grad)                                                                                                                 \
    SLOT(row_softmax_grad_wide)                                                                                                            \
    SLOT(row_match_sum)                                                                                                                    \
    SLOT(row_match_add)                                                                                                                    \
    SLOT(row_softplus_sum)                                                                                                                 \
    SLOT(row_sigmoid_grad)                                                                                                                 \
    SLOT(gemm_rows)                                                                                                                        \
    SLOT(rank_down)                                                                                                                        \
    SLOT(rank_up)                                                                                                                          \
    SLOT(rank_outer)                                                                                                                       \
    SLOT(row_dropout)                                                                                                                      \
    SLOT(row_merge)                                                                                                                        \
    SLOT(row_quick_gelu)                                                                                                                   \
    SLOT(row_quick_gelu_grad)                                                                                                              \
    SLOT(row_norm)                                                                                                                         \
    SLOT(row_range)                                                                                                                        \
    SLOT(row_quantize)                                                                                                                     \
    SLOT(int8_dot)                                                                                                                         \
    SLOT(int8_finish)                                                                                                                      \
    SLOT(attend)

/* Operands of gemm_rows: see gemm.h. The block of b is packed; a and c are whole. */
enum { CLIPFT_GEMM_PANEL = 16, CLIPFT_GEMM_DEPTH = 256 };

typedef struct clipft_gemm_block {
    clipft_matrix c; /* [rows, cols], col_stride 1 */
    clipft_matrix a; /* [rows, depth], depth <= CLIPFT_GEMM_DEPTH */
    const float *b;  /* [cols / 16 rounded up, depth, 16] */
    bool accumulate;
} clipft_gemm_block;

/* Operands of rank_up. Rows of v lie CLIPFT_RANK_PAD-padded, the others `*_stride` apart. */
typedef struct clipft_rank_tile {
    const float *v;     /* [rows, padded] */
    const float *panel; /* [rank, cols] */
    const float *init;  /* [rows, cols] what the products are added to; stride 0 repeats one row */
    float *out;         /* [rows, cols], may be init */
    int64_t rows, cols, rank, padded;
    int64_t panel_stride, init_stride, out_stride;
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

/* What a row holds, gathered piece by piece; starts as zeros, so that 0 is in the range. */
typedef struct clipft_range {
    float low, high;
    float bad; /* NaN once a NaN or an infinity was seen, else 0 */
} clipft_range;

/* Weights lie in panels of CLIPFT_INT8_PANEL output channels: [depth / 4][channel][4]. A tile takes CLIPFT_INT8_COLS channels at most. */
enum { CLIPFT_INT8_PANEL = 16, CLIPFT_INT8_COLS = 64 };

/* Operands of int8_dot. */
typedef struct clipft_int8_tile {
    const uint8_t *x; /* [rows, depth] 0 .. 127, rows x_stride apart */
    const int8_t *w;  /* [panels, depth / 4, 16, 4], panels w_stride apart */
    int64_t x_stride, w_stride;
    int64_t rows, panels, depth; /* depth a multiple of 4 */
    const int8_t *ahead;         /* panels that are multiplied next, w_stride apart: asked for meanwhile */
    int64_t ahead_panels;
} clipft_int8_tile;

typedef enum clipft_activation { CLIPFT_NO_ACTIVATION, CLIPFT_QUICK_GELU, CLIPFT_GELU, CLIPFT_ACTIVATIONS } clipft_activation;

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

/* Operands of attend. Keys and values are packed in groups of CLIPFT_ATTEND_COLS columns; scores have room for CLIPFT_ATTEND_ROWS rows. */
enum { CLIPFT_ATTEND_COLS = 64, CLIPFT_ATTEND_ROWS = 6 };

typedef struct clipft_attend {
    const float *q;      /* [rows, dim], rows q_stride apart */
    const float *keys;   /* [length / 64 rounded up, dim, 64], zeros beyond the last key */
    const float *values; /* [dim / 64 rounded up, length, 64], zeros beyond the last column */
    float *scores;       /* work space, [CLIPFT_ATTEND_ROWS, length rounded up to 64] */
    float *out;          /* [rows, dim], rows out_stride apart */
    int64_t q_stride, out_stride;
    int64_t rows, dim, length;
    float scale;
    bool causal; /* row i sees keys 0 .. i */
} clipft_attend;

typedef struct clipft_kernels {
    /* max_j scale * x[j]; NaNs are passed over. */
    float (*row_max)(const float *x, int64_t cols, float scale);

    /* e[j] = exp(scale * x[j] - max), max >= every scale * x[j]; col_sum[j] += weight * e[j]; returns the sum of e. */
    float (*row_exp_sum)(const float *x, int64_t cols, float scale, float max, float weight, float *col_sum);

    /* For each column of a [rows, cols] block whose rows lie `stride` apart: col_max[j] = max_i scale * x, col_sum[j] = sum_i exp(scale *
     * x - col_max[j]), over all rows but the column's pair, row pair_row + j. Of no rows: -Inf and 0. */
    void (*block_col_lse)(const float *x, int64_t rows, int64_t cols, int64_t stride, float scale, int64_t pair_row, float *col_max,
                          float *col_sum);

    /* out[j] = gain * (exp(logit - row's lse) + exp(logit - column's lse)) - shift with one exponential an element, as
     * gain * exp(scale * x - lse) * (own + cross * col_factor[j]) - shift. The caller sees to it that no factor overflows. out may be x. */
    void (*row_softmax_grad)(const float *x, float *out, int64_t cols, const clipft_softmax_row *row, const float *col_factor);

    /* The same with two exponentials an element, for tiles whose rows' and columns' logsumexps lie too far apart. */
    void (*row_softmax_grad_wide)(const float *x, float *out, int64_t cols, const clipft_softmax_row *row, const clipft_softmax_cols *col);

    /* Returns the sum of x[j] where ids[j] == id, and adds the sum of all x[j] to *all. */
    float (*row_match_sum)(const float *x, int64_t cols, const int32_t *ids, int32_t id, float *all);

    /* x[j] += value where ids[j] == id. */
    void (*row_match_add)(float *x, int64_t cols, const int32_t *ids, int32_t id, float value);

    /* Returns sum_j softplus(scale * x[j] + bias). */
    float (*row_softplus_sum)(const float *x, int64_t cols, float scale, float bias);

    /* out[j] = gain * sigmoid(scale * x[j] + bias); returns the sum of out. out may be x. */
    float (*row_sigmoid_grad)(const float *x, float *out, int64_t cols, float scale, float bias, float gain);

    /* c[i] = or += a[i] b for rows i of begin .. end - 1. */
    void (*gemm_rows)(const clipft_gemm_block *block, int64_t begin, int64_t end);

    /* v[i][k] += sum_j x[i][j] * panel[j][k]; panel is [cols, padded], v [rows, padded]. */
    void (*rank_down)(const float *x, int64_t stride, int64_t rows, int64_t cols, const float *panel, int64_t padded, float *v,
                      clipft_ahead ahead);

    /* out[i][j] = init[i][j] + sum_k v[i][k] * panel[k][j]. */
    void (*rank_up)(const clipft_rank_tile *tile);

    /* acc[k][j] += sum_i v[i][k] * x[i][j]; acc is [padded, cols] and cols a multiple of 16; rows of acc from `rank` on are left undefined.
     */
    void (*rank_outer)(const float *v, int64_t padded, int64_t rows, int64_t rank, const float *x, int64_t stride, int64_t cols, float *acc,
                       int64_t acc_stride, clipft_ahead ahead);

    /* mask[j] = -1 where the element is kept, else 0 and x[j] = 0. Integer arithmetic only: every ISA agrees bit for bit. */
    void (*row_dropout)(const clipft_dropout_row *row, float *x, int32_t *mask, int64_t n);

    /* out[j] = base[j] + x[j], or x[j] where base is NULL, with x[j] taken as zero where mask[j] is 0 (mask may be NULL). */
    void (*row_merge)(const float *x, const int32_t *mask, const float *base, float *out, int64_t n);

    /* out[j] = x[j] * sigmoid(1.702 * x[j]); out may be x. */
    void (*row_quick_gelu)(const float *x, float *out, int64_t n);

    /* out[j] = grad[j] * d quick_gelu(x[j]) / d x[j]; out may be either. */
    void (*row_quick_gelu_grad)(const float *x, const float *grad, float *out, int64_t n);

    /* out[j] = (x[j] - mean) / sqrt(variance + eps) * weight[j] + bias[j], mean and (biased) variance those of x; out may be x. */
    void (*row_norm)(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *out);

    /* Widens the range to hold x. Exact: every ISA agrees. */
    void (*row_range)(const float *x, int64_t n, clipft_range *range);

    /* q[j] = clamp(round(x[j] * inverse) + zero, 0, 127), the product rounded to float32 and then to an integer, both to nearest even:
     * every ISA agrees bit for bit. |x[j] * inverse| < 2^21. */
    void (*row_quantize)(const float *x, int64_t n, float inverse, int32_t zero, uint8_t *q);

    /* sums[i][j] = sum_k x[i][k] * w[j][k], rows CLIPFT_INT8_COLS apart. Exact. */
    void (*int8_dot)(const clipft_int8_tile *tile, int32_t *sums);

    /* out[i][j] = activation((sums[i][j] - row_zero[i] * col_sum[j]) * col_scale[j] * row_scale[i] + bias[j]) + residual[i][j], the bracket
     * exact; where the activation tends to 0 it is 0, even of -Inf. */
    void (*int8_finish)(const clipft_int8_finish *finish, const int32_t *sums);

    /* out[i] = sum_j p[j] values[j] / sum_j p[j], p[j] = exp(scale * <q[i], key j> - their maximum), over the keys that row i sees; no NaN
     * among other keys and values reaches it. */
    void (*attend)(const clipft_attend *head);
} clipft_kernels;

extern clipft_kernels clipft_kernel_table; /* filled by dispatch.c */

/* A matrix of logits scale * image text^T (+ bias) that is never there as a whole: rows are the caller's own images, columns all texts. */
typedef struct clipft_logits {
    clipft_matrix image; /* [rows, dim] */
    clipft_matrix text;  /* [cols, dim] */
    int64_t row_offset;  /* image i pairs with text row_offset + i */
    float scale;
    float *kept;       /* [kept_rows, cols] raw products that the forward pass leaves for the backward pass, or NULL */
    int64_t kept_rows; /* a multiple of CLIPFT_TILE, or all rows */
} clipft_logits;

enum { CLIPFT_TILE = 1024 };

/* The contrastive loss's targets: uniform over the columns of the row's class, mixed with the uniform distribution. */
typedef struct clipft_targets {
    const int32_t *class_ids;  /* [cols], or NULL: only the pair itself */
    const float *class_weight; /* [cols] 1 / size of the class, with class_ids */
    float smoothing;           /* e in (1 - e) * target + e / cols */
} clipft_targets;

/* Writes row_lse [rows] and col_lse [cols] (over these rows only), and *target = sum of target probability * logit over the rows. Returns
 * false when memory ran out or the host failed. */
bool clipft_contrastive_forward(const clipft_logits *logits, const clipft_targets *targets, const clipft_host *host, double *row_lse,
                                double *col_lse, double *target);

/* d_image [rows, dim] and d_text [cols, dim] (these rows' share; either may lack data: not wanted), *d_scale likewise, of grad * (sum of
 * row and column cross-entropies) / 2 cols; row_lse and col_lse are those of the whole matrix. */
bool clipft_contrastive_backward(const clipft_logits *logits, const clipft_targets *targets, const clipft_host *host, const double *row_lse,
                                 const double *col_lse, double grad, clipft_matrix d_image, clipft_matrix d_text, double *d_scale);

/* *loss = sum over these rows of softplus(-z logit), z = 1 on pairs and -1 elsewhere, divided by cols. */
bool clipft_sigmoid_forward(const clipft_logits *logits, float bias, const clipft_host *host, double *loss);

bool clipft_sigmoid_backward(const clipft_logits *logits, float bias, const clipft_host *host, double grad, clipft_matrix d_image,
                             clipft_matrix d_text, double *d_scale, double *d_bias);

/* 16-bit floats to float32 and back (round to nearest even). */
void clipft_bfloat16_to_float(const uint16_t *src, float *dst, int64_t n);
void clipft_float16_to_float(const uint16_t *src, float *dst, int64_t n);
void clipft_float_to_bfloat16(const float *src, uint16_t *dst, int64_t n);
void clipft_float_to_float16(const float *src, uint16_t *dst, int64_t n);

#endif
