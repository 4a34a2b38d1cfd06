/* The contract of attention.h's micro-kernel. */
#ifndef CLIPFT_ATTENTION_KERNELS_H
#define CLIPFT_ATTENTION_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

/* Operands of attend. Keys and values are packed in groups of CLIPFT_ATTEND_COLS columns; scores have room for CLIPFT_ATTEND_ROWS rows. */
enum { CLIPFT_ATTEND_COLS = 64, CLIPFT_ATTEND_PANEL = 16, CLIPFT_ATTEND_ROWS = 6 };

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

/* Operands of attend_grad: rows are `width` apart, dim rounded up to CLIPFT_ATTEND_PANEL, with zeros beyond dim. */
enum { CLIPFT_ATTEND_BLOCK = 60 /* queries */ };

typedef struct clipft_attend_grad {
    const float *q, *grad;          /* [rows, width]; grad: of the result */
    const float *keys;              /* [length, width] */
    const float *keys_t, *values_t; /* as attend's keys */
    float *p, *ds;                  /* work space, [CLIPFT_ATTEND_BLOCK, stride]: length + CLIPFT_ATTEND_ROWS, rounded up to 64 */
    float *dq;                      /* [rows, width] */
    float *dk, *dv;                 /* [length + CLIPFT_ATTEND_ROWS, width], zeros before */
    int64_t rows, dim, length, width, stride;
    float scale;
    bool causal;
} clipft_attend_grad;

typedef struct clipft_attention_kernels {
    /* out[i] = sum_j p[j] values[j] / sum_j p[j], p[j] = exp(scale * <q[i], key j> - their maximum), over the keys that row i sees; no NaN
     * among other keys and values reaches it. */
    void (*attend)(const clipft_attend *head);
    /* The gradients of attend's operands: dv = p^T grad, ds = scale p (grad v^T - its mean under p), dq = ds k, dk = ds^T q, where p are
     * the weights that rows of attend's result are means by (Dao et al. 2022, arXiv:2205.14135, algorithm 4). A NaN may reach all of them.
     */
    void (*attend_grad)(const clipft_attend_grad *head);
} clipft_attention_kernels;

#endif
