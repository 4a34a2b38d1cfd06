/* The micro-kernel of attention in plain C: the contract of attention_kernels.h to the letter, and what every CPU can run. */
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
