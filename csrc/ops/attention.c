/* attention: self-attention from the projection of queries, keys and values. The work is kernels/attention/attention.h. */
#include "../kernels/attention/attention.h"
#include "ops.h"

#include <math.h>

enum { MAX_SIZE = 1 << 24 }; /* tokens, and features: sizes of the work space are far from 2^63 */

static bool check(const clipft_tensor *qkv, clipft_attention *a, clipft_error *error)
{
    char shape[96];
    if (!clipft_check_float(qkv, error) || !clipft_check_cpu(qkv, error)) return false;
    if (a->heads < 1) return clipft_fail(error, CLIPFT_VALUE_ERROR, "heads must be at least 1, got %lld", (long long)a->heads);
    if (qkv->ndim != 3 || qkv->size[1] > MAX_SIZE || qkv->size[2] > MAX_SIZE || qkv->size[2] == 0 || qkv->size[2] % 3 != 0 ||
        qkv->size[2] / 3 % a->heads != 0)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "qkv must be [batch, length, 3 * heads * dim] with %lld heads, got shape %s",
                           (long long)a->heads, clipft_shape_text(qkv, shape, sizeof shape));
    a->batch = qkv->size[0];
    a->length = qkv->size[1];
    a->dim = qkv->size[2] / 3 / a->heads;
    if (a->queries < 0 || a->queries > a->length)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "queries must be 0 to the length, %lld, got %lld", (long long)a->length,
                           (long long)a->queries);
    if (!isfinite(a->scale) || a->scale <= 0.0F)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "scale must be finite and > 0, got %g", (double)a->scale);
    return clipft_tensor_view(qkv, &a->qkv) || clipft_fail(error, CLIPFT_VALUE_ERROR, "qkv must be contiguous");
}

static bool attend(clipft_attention *a, const clipft_tensor *qkv, clipft_tensor *out, clipft_error *error)
{
    const int64_t sizes[] = {a->batch, a->queries, a->heads * a->dim};
    return clipft_empty_view(qkv, 3, sizes, out, &a->out, error) &&
           (clipft_attention_run(a, &clipft_torch_host) ||
            clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or torch's threads failed"));
}

static void run_attention(const attention_args *args, attention_results *results, clipft_error *error)
{
    clipft_attention a = {.heads = clipft_unbox_int(args->heads),
                          .queries = clipft_unbox_int(args->queries),
                          .scale = (float)clipft_unbox_float(args->scale),
                          .causal = clipft_unbox_bool(args->causal)};
    clipft_tensor qkv = {0}, out = {0};
    if (clipft_unbox(args->qkv, "qkv", &qkv, error) && check(&qkv, &a, error) && attend(&a, &qkv, &out, error))
        results->result = clipft_box(&out);
    clipft_release(&out);
    clipft_release(&qkv);
}
CLIPFT_CPU_ENTRY(attention)
