/* The rank products of a linear layer with a LoRA branch, y = x W^T + b + s drop(act(x)) A^T B^T, around the large products with W, which
 * the caller makes:
 *
 *   v = m . act(x) A^T        [rows, r]       clipft_lora_down
 *   y (+)= b + s v B^T        [rows, out]     clipft_lora_up
 *   u = s dy B                [rows, r]       clipft_lora_gradient_up, one pass over dy:
 *   dB = s dy^T v             [out, r]
 *   dA = u^T (m . act(x))     [r, in]         clipft_lora_gradient_down, one pass over x and dx:
 *   dx (+)= m . (u A)         [rows, in]      then times act'(x)
 *
 * m is the dropout mask, a function of (seed, row, column) that is made wherever it is needed; s includes 1 / (1 - p). Everything is
 * float32; matrices of 16-bit floats are converted a block at a time. Each sum over rows runs in parts that depend on the shape only, so
 * no result depends on the number of threads. */
#ifndef CLIPFT_LORA_H
#define CLIPFT_LORA_H

#include "../common/host.h"
#include "../common/views.h"
#include "lora_kernels.h"

typedef struct clipft_dropout {
    uint64_t seed;
    int32_t threshold; /* of a hash as a signed number */
    bool active;
} clipft_dropout;

/* 0 <= p < 1; p = 0 is inactive. */
clipft_dropout clipft_dropout_make(double p, int64_t seed);

/* Row `row`, from column `col` on. */
clipft_dropout_row clipft_dropout_at(const clipft_dropout *dropout, int64_t row, int64_t col);

/* mask[i][j] = 1 where the element is kept, else 0. */
bool clipft_dropout_mask(const clipft_dropout *dropout, const clipft_host *host, float *mask, int64_t rows, int64_t cols);

typedef struct clipft_lora {
    clipft_view lora_a; /* [r, in] */
    clipft_view lora_b; /* [out, r] */
    clipft_dropout dropout;
    float scale;     /* s / (1 - p) */
    bool quick_gelu; /* x passes it first */
} clipft_lora;

/* r rounded up to CLIPFT_RANK_PAD: the columns of v and u, zeros from r on. */
int64_t clipft_lora_padded(int64_t rank);

/* Each returns false when memory ran out or the host failed. */

/* v [rows, padded]; where `activated` has data, act(x) goes there. */
bool clipft_lora_down(const clipft_lora *lora, const clipft_host *host, const clipft_view *x, const clipft_view *activated, float *v);

/* y = bias + s v B^T, or y += s v B^T without a bias (NULL). A bias without data is zero. */
bool clipft_lora_up(const clipft_lora *lora, const clipft_host *host, const float *v, const clipft_view *bias, const clipft_view *y);

/* u [rows, padded] and d_b [out, r]; either may lack data: not wanted. */
bool clipft_lora_gradient_up(const clipft_lora *lora, const clipft_host *host, const clipft_view *dy, const float *v, float *u,
                             const clipft_view *d_b);

/* d_a [r, in] and d_x [rows, in]; either may lack data. With `accumulate` d_x holds dy W already, else it is overwritten (and act'(x) is
 * not applied). */
bool clipft_lora_gradient_down(const clipft_lora *lora, const clipft_host *host, const clipft_view *x, const float *u,
                               const clipft_view *d_a, const clipft_view *d_x, bool accumulate);

/* The operand of a product out of the rank: panel[k][j] = scale * m[k][j], rows `stride` apart, zeros up to there. */
void clipft_lora_pack(clipft_view m, float scale, float *panel, int64_t stride);

/* sums[j] = sum_i m[i][j]. */
bool clipft_column_sums(const clipft_host *host, const clipft_view *m, const clipft_view *sums);

/* y = quick_gelu(x); dx = dy * quick_gelu'(x). */
bool clipft_quick_gelu(const clipft_host *host, const clipft_view *x, const clipft_view *y);
bool clipft_quick_gelu_backward(const clipft_host *host, const clipft_view *dy, const clipft_view *x, const clipft_view *dx);

#endif
