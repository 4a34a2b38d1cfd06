/* The micro-kernels of attention in plain C: the contract of attention_kernels.h to the letter, and what every CPU can run. */
#include "../table.h"

#include <math.h>

enum { COLS = CLIPFT_ATTEND_COLS };

static float score(const clipft_attend *t, int64_t i, int64_t j)
{
    const float *q = t->q + i * t->q_stride, *k = t->keys + j / COLS * COLS * t->dim + j % COLS;
    double sum = 0.0;
    for (int64_t d = 0; d < t->dim; ++d) sum += (double)q[d] * (double)k[d * COLS];
    return (float)sum * t->scale;
}

void clipft_attention_attend_ref(const clipft_attend *t)
{
    for (int64_t i = 0; i < t->rows; ++i) {
        const int64_t n = t->causal ? i + 1 : t->length;
        float max = -INFINITY;
        double sum = 0.0;
        for (int64_t j = 0; j < n; ++j) {
            t->scores[j] = score(t, i, j);
            max = t->scores[j] > max ? t->scores[j] : max;
        }
        for (int64_t j = 0; j < n; ++j) sum += (double)(t->scores[j] = expf(t->scores[j] - max));
        for (int64_t d = 0; d < t->dim; ++d) {
            const float *v = t->values + d / COLS * COLS * t->length + d % COLS;
            double out = 0.0;
            for (int64_t j = 0; j < n; ++j) out += (double)t->scores[j] * (double)v[j * COLS];
            t->out[i * t->out_stride + d] = (float)(out / sum);
        }
    }
}

/* The weights of row i, and the gradients of its scores. */
static void grad_row(const clipft_attend_grad *t, int64_t i, int64_t n)
{
    double max = -INFINITY, sum = 0.0, mean = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        const int64_t column = j / COLS * COLS * t->dim + j % COLS;
        double score = 0.0, dp = 0.0;
        for (int64_t d = 0; d < t->dim; ++d) {
            score += (double)t->q[i * t->width + d] * (double)t->keys_t[column + d * COLS];
            dp += (double)t->grad[i * t->width + d] * (double)t->values_t[column + d * COLS];
        }
        t->p[j] = (float)score * t->scale;
        t->ds[j] = (float)dp;
        max = (double)t->p[j] > max ? (double)t->p[j] : max;
    }
    for (int64_t j = 0; j < n; ++j) sum += (double)(t->p[j] = expf(t->p[j] - (float)max));
    for (int64_t j = 0; j < n; ++j) mean += (double)(t->p[j] = (float)((double)t->p[j] / sum)) * (double)t->ds[j];
    for (int64_t j = 0; j < n; ++j) t->ds[j] = (float)((double)t->p[j] * ((double)t->ds[j] - mean)) * t->scale;
}

void clipft_attention_attend_grad_ref(const clipft_attend_grad *t)
{
    for (int64_t i = 0; i < t->rows; ++i) {
        const int64_t n = t->causal ? i + 1 : t->length, row = i * t->width;
        grad_row(t, i, n);
        for (int64_t d = 0; d < t->width; ++d) {
            double dq = 0.0;
            for (int64_t j = 0; j < n; ++j) {
                dq += (double)t->ds[j] * (double)t->keys[j * t->width + d];
                t->dk[j * t->width + d] += t->ds[j] * t->q[row + d];
                t->dv[j * t->width + d] += t->p[j] * t->grad[row + d];
            }
            t->dq[row + d] = (float)dq;
        }
    }
}
