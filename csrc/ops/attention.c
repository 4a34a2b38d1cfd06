/* attention, and its gradient, from the projections of queries, keys and values. The work is kernels/attention/attention.h. */
#include "../kernels/attention/attention.h"
#include "ops.h"

#include <math.h>

enum { MAX_SIZE = 1 << 24 }; /* tokens, and features: sizes of the work space are far from 2^63 */

typedef struct attention_inputs {
    clipft_tensor query, key, value;
    clipft_attention a;
} attention_inputs;

/* [batch, rows, heads * dim], of queries or of the tokens that they attend to. */
static bool check_tensor(const clipft_tensor *t, const clipft_tensor *query, int64_t heads, clipft_view *view, clipft_error *error)
{
    char shape[96];
    if (!clipft_check_float(t, error) || !clipft_check_cpu(t, error)) return false;
    if (t->dtype != query->dtype)
        return clipft_fail(error, CLIPFT_TYPE_ERROR, "%s must have the dtype of query, %s, got %s", t->name,
                           clipft_dtype_name(query->dtype), clipft_dtype_name(t->dtype));
    if (t->ndim != 3 || t->size[1] > MAX_SIZE || t->size[2] > MAX_SIZE || t->size[2] == 0 || t->size[2] % heads != 0)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be [batch, length, heads * dim] with %lld heads, got shape %s", t->name,
                           (long long)heads, clipft_shape_text(t, shape, sizeof shape));
    return clipft_tensor_view(t, view) || clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be contiguous", t->name);
}

static bool check_like(const clipft_tensor *t, const clipft_tensor *like, clipft_error *error)
{
    char shape[96], expected[96];
    for (int d = 0; d < 3; ++d)
        if (t->size[d] != like->size[d])
            return clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must have the shape of %s, %s, got shape %s", t->name, like->name,
                               clipft_shape_text(like, expected, sizeof expected), clipft_shape_text(t, shape, sizeof shape));
    return true;
}

static bool check(attention_inputs *in, clipft_error *error)
{
    clipft_attention *a = &in->a;
    const clipft_tensor *q = &in->query, *k = &in->key;
    char shape[96];
    if (a->heads < 1) return clipft_fail(error, CLIPFT_VALUE_ERROR, "heads must be at least 1, got %lld", (long long)a->heads);
    if (!check_tensor(q, q, a->heads, &a->query, error) || !check_tensor(k, q, a->heads, &a->key, error) ||
        !check_tensor(&in->value, q, a->heads, &a->value, error) || !check_like(&in->value, k, error))
        return false;
    if (k->size[0] != q->size[0] || k->size[2] != q->size[2])
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "key must be [%lld, length, %lld] as query is, got shape %s", (long long)q->size[0],
                           (long long)q->size[2], clipft_shape_text(k, shape, sizeof shape));
    a->batch = q->size[0];
    a->queries = q->size[1];
    a->length = k->size[1];
    a->dim = q->size[2] / a->heads;
    if (a->queries > 0 && (a->length == 0 || (a->causal && a->queries > a->length)))
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "key must have %s, got %lld of them for %lld queries",
                           a->causal ? "a token for each query" : "tokens", (long long)a->length, (long long)a->queries);
    return (isfinite(a->scale) && a->scale > 0.0F) ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "scale must be finite and > 0, got %g", (double)a->scale);
}

/* Takes all three, whatever else happens. */
static bool take(attention_inputs *in, clipft_slot_Tensor query, clipft_slot_Tensor key, clipft_slot_Tensor value, clipft_error *error)
{
    bool ok = clipft_unbox(query, "query", &in->query, error);
    ok = clipft_unbox(key, "key", &in->key, error) && ok;
    return clipft_unbox(value, "value", &in->value, error) && ok && check(in, error);
}

static void free_inputs(attention_inputs *in)
{
    clipft_release(&in->query);
    clipft_release(&in->key);
    clipft_release(&in->value);
}

static const char *const FAILED = "out of memory, or torch's threads failed";

static void run_attention(const attention_args *args, attention_results *results, clipft_error *error)
{
    attention_inputs in = {.a = {.heads = clipft_unbox_int(args->heads),
                                 .scale = (float)clipft_unbox_float(args->scale),
                                 .causal = clipft_unbox_bool(args->causal)}};
    clipft_tensor out = {0};
    clipft_view view = {0};
    if (!take(&in, args->query, args->key, args->value, error) || !clipft_empty_view(&in.query, 3, in.query.size, &out, &view, error))
        goto done;
    if (clipft_attention_run(&in.a, &view, &clipft_torch_host))
        results->result = clipft_box(&out);
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "%s", FAILED);
done:
    clipft_release(&out);
    free_inputs(&in);
}
CLIPFT_CPU_ENTRY(attention)

static void run_attention_backward(const attention_backward_args *args, attention_backward_results *results, clipft_error *error)
{
    attention_inputs in = {.a = {.heads = clipft_unbox_int(args->heads),
                                 .scale = (float)clipft_unbox_float(args->scale),
                                 .causal = clipft_unbox_bool(args->causal)}};
    clipft_tensor grad = {0}, query = {0}, key = {0}, value = {0};
    clipft_view view = {0};
    clipft_attention_grads grads = {0};
    const bool taken = clipft_unbox(args->grad, "grad", &grad, error);
    if (!take(&in, args->query, args->key, args->value, error) || !taken || !check_tensor(&grad, &in.query, in.a.heads, &view, error) ||
        !check_like(&grad, &in.query, error) || !clipft_empty_view(&in.query, 3, in.query.size, &query, &grads.query, error) ||
        !clipft_empty_view(&in.key, 3, in.key.size, &key, &grads.key, error) ||
        !clipft_empty_view(&in.value, 3, in.value.size, &value, &grads.value, error))
        goto done;
    if (clipft_attention_grad(&in.a, &view, &grads, &clipft_torch_host))
        *results = (attention_backward_results){clipft_box(&query), clipft_box(&key), clipft_box(&value)};
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "%s", FAILED);
done:
    clipft_release(&value);
    clipft_release(&key);
    clipft_release(&query);
    clipft_release(&grad);
    free_inputs(&in);
}
CLIPFT_CPU_ENTRY(attention_backward)
