/* Attention of a transformer's block: out = softmax(scale q k^T) v for every picture or text and every head, read from the projections of
 * queries, keys and values as they are, written as the output projection reads it.
 *
 * A head is one task: its keys and values are packed once, the keys transposed, and stay in the cache while blocks of queries go by. Each
 * block computes its scores against all keys, their softmax, and the product with the values, which stays in registers. The gradient keeps
 * nothing of it: it computes the weights of a block of queries again, and of them five products. All in float32. */
#ifndef CLIPFT_ATTENTION_H
#define CLIPFT_ATTENTION_H

#include "../common/host.h"
#include "../common/views.h"

typedef struct clipft_attention {
    clipft_view query;      /* [batch * queries, heads * dim] */
    clipft_view key, value; /* [batch * length, heads * dim] */
    int64_t batch, queries, length, heads, dim;
    float scale; /* > 0 */
    bool causal; /* query i attends to tokens 0 .. i; queries <= length */
} clipft_attention;

/* Where the gradients go, each of its operand's shape, float32 or not as it is. */
typedef struct clipft_attention_grads {
    clipft_view query, key, value;
} clipft_attention_grads;

/* out [batch * queries, heads * dim]. False when memory ran out or the host failed, here and below. */
bool clipft_attention_run(const clipft_attention *attention, const clipft_view *out, const clipft_host *host);
/* From the gradient of out. */
bool clipft_attention_grad(const clipft_attention *attention, const clipft_view *grad, const clipft_attention_grads *grads,
                           const clipft_host *host);

#endif
