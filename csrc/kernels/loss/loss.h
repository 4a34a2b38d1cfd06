/* The losses over a matrix of logits that is never there as a whole: see contrastive.c and sigmoid.c for the mathematics. */
#ifndef CLIPFT_LOSS_H
#define CLIPFT_LOSS_H

#include "../common/host.h"

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

/* What the sigmoid loss adds to the products, and which of its pairs are positive besides each row's own. */
typedef struct clipft_sigmoid_terms {
    float bias;
    const int32_t *class_ids; /* [cols], or NULL: no other; else those of the row's class */
} clipft_sigmoid_terms;

/* The loss's gradients with respect to what it is of: matrices [rows, dim] and [cols, dim], of which one may lack data (not wanted). */
typedef struct clipft_sigmoid_gradients {
    clipft_matrix image, text;
    double *scale, *bias;
} clipft_sigmoid_gradients;

/* *loss = sum over these rows of softplus(-y logit), y = 1 on positive pairs and -1 elsewhere, divided by cols; with `grad`, which may be
 * NULL, these rows' share of its gradients. Returns false when memory ran out or the host failed. */
bool clipft_sigmoid(const clipft_logits *logits, const clipft_sigmoid_terms *terms, const clipft_host *host, double *loss,
                    const clipft_sigmoid_gradients *grad);

#endif
