/* Self-attention of a transformer's block: out = softmax(scale q k^T) v for every picture or text and every head, read from the projection
 * of queries, keys and values as it is, written as the output projection reads it.
 *
 * A head is one task: its keys and values are packed once, the keys transposed, and stay in the cache while blocks of queries go by. Each
 * block computes its scores against all keys, their softmax, and the product with the values, which stays in registers. All in float32. */
#ifndef CLIPFT_ATTENTION_H
#define CLIPFT_ATTENTION_H

#include "../common/host.h"
#include "../common/views.h"

typedef struct clipft_attention {
    clipft_view qkv; /* [batch * length, 3 * heads * dim] */
    clipft_view out; /* [batch * queries, heads * dim] */
    int64_t batch, length, heads, dim;
    int64_t queries; /* of the first so many tokens, <= length */
    float scale;     /* > 0 */
    bool causal;     /* token i attends to tokens 0 .. i */
} clipft_attention;

/* False when memory ran out or the host failed. */
bool clipft_attention_run(const clipft_attention *attention, const clipft_host *host);

#endif
