/* lora_linear: y = x W^T + b + s drop(act(x)) A^T B^T and its gradients. The products with W are torch's, the rest is kernels/lora.h.
 *
 * In float32 the rank products go first: they write y with the bias in it (and dx), which the large product then adds to, as it would add
 * to a bias. In 16-bit floats they go last and add in float32 to what the large product rounded: merged into W they would vanish in its
 * rounding. */
#include "../kernels/lora.h"
#include "../tensor.h"
#include "ops.h"

#include <stdlib.h>
#include <string.h>

typedef struct lora_inputs {
    clipft_tensor input, weight, bias, lora_a, lora_b, seed;
    clipft_view x, w, bias_row; /* [rows, in], [out, in], [1, out] or without data */
    clipft_lora lora;
    int64_t rows, in, out, rank, padded;
} lora_inputs;

/* ---- checks: clipft/linear.py has the same words ---- */

static bool check_float(const clipft_tensor *t, clipft_error *error)
{
    return clipft_is_float(t) ||
           clipft_fail(error, "%s must be float32, bfloat16 or float16, got %s", t->name, clipft_dtype_name(t->dtype));
}

static bool check_like_input(const clipft_tensor *t, const clipft_tensor *input, bool or_float32, clipft_error *error)
{
    if (t->dtype == input->dtype || (or_float32 && t->dtype == clipft_torch.aoti_torch_dtype_float32())) return clipft_check_cpu(t, error);
    return clipft_fail(error, "%s must have the dtype of input, %s%s, got %s", t->name, clipft_dtype_name(input->dtype),
                       or_float32 ? ", or float32" : "", clipft_dtype_name(t->dtype));
}

static bool check_shape(const clipft_tensor *t, int64_t rows, int64_t cols, const char *layout, clipft_error *error)
{
    char shape[96];
    const bool ok = t->ndim == 2 && (rows < 0 ? t->size[0] > 0 : t->size[0] == rows) && (cols < 0 ? t->size[1] > 0 : t->size[1] == cols);
    if (ok) return true;
    clipft_shape_text(t, shape, sizeof shape);
    if (rows < 0) return clipft_fail(error, "%s must be %s with in = %lld, got shape %s", t->name, layout, (long long)cols, shape);
    return clipft_fail(error, "%s must be %s, [%lld, %lld], got shape %s", t->name, layout, (long long)rows, (long long)cols, shape);
}

static bool check_input(const clipft_tensor *t, clipft_error *error)
{
    char shape[96];
    if (!check_float(t, error) || !clipft_check_cpu(t, error)) return false;
    if (t->ndim < 1 || t->ndim > CLIPFT_MAX_DIM || t->size[t->ndim - 1] == 0)
        return clipft_fail(error, "input must be [..., in] with in > 0 and at most %d dimensions, got shape %s", CLIPFT_MAX_DIM,
                           clipft_shape_text(t, shape, sizeof shape));
    return true;
}

static bool check_bias(const clipft_tensor *t, const clipft_tensor *input, int64_t out, clipft_error *error)
{
    char shape[96];
    if (t->ndim == 1 && t->size[0] == 0) return true; /* none */
    if (!check_like_input(t, input, false, error)) return false;
    return (t->ndim == 1 && t->size[0] == out) ||
           clipft_fail(error, "bias must be [out], [%lld], got shape %s", (long long)out, clipft_shape_text(t, shape, sizeof shape));
}

/* The seed is looked at where there is dropout. */
static bool take_dropout(const clipft_tensor *seed, double p, clipft_dropout *dropout, clipft_error *error)
{
    if (!(p >= 0.0 && p < 1.0)) return clipft_fail(error, "dropout must be in [0, 1), got %g", p);
    *dropout = clipft_dropout_make(p, 0);
    if (p == 0.0) return true;
    if (!clipft_check_dtype(seed, clipft_torch.aoti_torch_dtype_int64(), "an int64 tensor", error) || !clipft_check_cpu(seed, error) ||
        !clipft_check_dim(seed, 0, "0-d", error))
        return false;
    *dropout = clipft_dropout_make(p, *(const int64_t *)seed->data);
    return true;
}

static bool view_of(const clipft_tensor *t, clipft_view *view, clipft_error *error)
{
    return clipft_tensor_view(t, view) || clipft_fail(error, "%s must be contiguous where it has more than two dimensions", t->name);
}

static bool check_inputs(lora_inputs *in, bool has_bias, clipft_error *error)
{
    const clipft_tensor *input = &in->input;
    if (!check_input(input, error)) return false;
    in->in = input->size[input->ndim - 1];
    if (!check_like_input(&in->weight, input, false, error) || !check_shape(&in->weight, -1, in->in, "[out, in]", error)) return false;
    in->out = in->weight.size[0];
    if (has_bias && !check_bias(&in->bias, input, in->out, error)) return false;
    if (!check_like_input(&in->lora_a, input, true, error) || !check_shape(&in->lora_a, -1, in->in, "[r, in]", error)) return false;
    in->rank = in->lora_a.size[0];
    in->padded = clipft_lora_padded(in->rank);
    return check_like_input(&in->lora_b, input, true, error) && check_shape(&in->lora_b, in->out, in->rank, "[out, r]", error);
}

/* input, weight, [bias,] lora_a, lora_b and seed from `stack` on. */
static bool take_inputs(lora_inputs *in, const StableIValue *stack, bool has_bias, double scaling, double p, clipft_error *error)
{
    int slot = 0;
    bool ok = clipft_unbox(stack[slot++], "input", &in->input, error);
    ok &= clipft_unbox(stack[slot++], "weight", &in->weight, error);
    if (has_bias) ok &= clipft_unbox(stack[slot++], "bias", &in->bias, error);
    ok &= clipft_unbox(stack[slot++], "lora_a", &in->lora_a, error);
    ok &= clipft_unbox(stack[slot++], "lora_b", &in->lora_b, error);
    ok &= clipft_unbox(stack[slot++], "seed", &in->seed, error);
    ok = ok && check_inputs(in, has_bias, error) && take_dropout(&in->seed, p, &in->lora.dropout, error) &&
         view_of(&in->input, &in->x, error) && view_of(&in->weight, &in->w, error) && view_of(&in->lora_a, &in->lora.lora_a, error) &&
         view_of(&in->lora_b, &in->lora.lora_b, error);
    if (ok && has_bias && in->bias.size[0] > 0) ok = view_of(&in->bias, &in->bias_row, error);
    in->lora.scale = (float)(scaling / (1.0 - p));
    in->rows = in->x.rows;
    return ok;
}

static void free_inputs(lora_inputs *in)
{
    clipft_release(&in->input);
    clipft_release(&in->weight);
    clipft_release(&in->bias);
    clipft_release(&in->lora_a);
    clipft_release(&in->lora_b);
    clipft_release(&in->seed);
}

/* ---- forward ---- */

/* A temporary [rows, cols] in x's dtype. */
static bool temporary(const lora_inputs *in, int64_t cols, clipft_tensor *tensor, clipft_view *view, clipft_error *error)
{
    const int64_t sizes[] = {in->rows, cols};
    return clipft_empty(in->input.dtype, 2, sizes, tensor, error) && view_of(tensor, view, error);
}

static bool forward_products(const lora_inputs *in, const clipft_view *activated, float *rank, const clipft_view *y)
{
    const clipft_host *host = &clipft_torch_host;
    const clipft_view w_t = clipft_view_transposed(in->w), *x = activated->data ? activated : &in->x;
    if (in->rows == 0) return true;
    if (!clipft_lora_down(&in->lora, host, &in->x, activated, rank)) return false;
    if (y->kind == CLIPFT_FLOAT32) return clipft_lora_up(&in->lora, host, rank, &in->bias_row, y) && clipft_torch_gemm(y, y, x, &w_t);
    return clipft_torch_gemm(y, in->bias_row.data ? &in->bias_row : NULL, x, &w_t) && clipft_lora_up(&in->lora, host, rank, NULL, y);
}

void clipft_op_lora_linear(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "lora_linear"};
    lora_inputs in = {0};
    clipft_tensor output = {0}, rank = {0}, activated = {0};
    clipft_view y = {0}, act = {0};
    int64_t sizes[CLIPFT_MAX_DIM], rank_sizes[2];

    if (!take_inputs(&in, stack, true, clipft_unbox_double(stack[6]), clipft_unbox_double(stack[7]), &error)) goto done;
    in.lora.quick_gelu = stack[8] & 1U;
    memcpy(sizes, in.input.size, sizeof sizes);
    sizes[in.input.ndim - 1] = in.out;
    rank_sizes[0] = in.rows;
    rank_sizes[1] = in.padded;
    if (!clipft_empty(in.input.dtype, in.input.ndim, sizes, &output, &error) || !view_of(&output, &y, &error) ||
        !clipft_empty(clipft_torch.aoti_torch_dtype_float32(), 2, rank_sizes, &rank, &error) ||
        (in.lora.quick_gelu && !temporary(&in, in.in, &activated, &act, &error)))
        goto done;
    if (!forward_products(&in, &act, rank.data, &y)) {
        clipft_fail(&error, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    stack[0] = clipft_box(&output);
    stack[1] = clipft_box(&rank);
done:
    clipft_release(&output);
    clipft_release(&rank);
    clipft_release(&activated);
    free_inputs(&in);
    clipft_throw(&error, __FILE__, __LINE__);
}

/* ---- backward ---- */

typedef struct lora_gradients {
    clipft_tensor input, weight, bias, lora_a, lora_b; /* [0] where not needed */
    clipft_view d_x, d_w, d_bias, d_a, d_b;            /* without data where not needed */
    clipft_tensor u, activated;                        /* temporaries */
    clipft_view act;
} lora_gradients;

static bool make_gradient(bool needed, const clipft_tensor *like, clipft_tensor *grad, clipft_view *view, clipft_error *error)
{
    const int64_t none = 0;
    if (!needed) return clipft_empty(like->dtype, 1, &none, grad, error);
    return clipft_empty(like->dtype, like->ndim, like->size, grad, error) && view_of(grad, view, error);
}

static bool make_gradients(lora_gradients *g, const lora_inputs *in, const StableIValue *needs, clipft_error *error)
{
    const bool need_input = needs[0] & 1U, need_weight = needs[1] & 1U, need_bias = needs[2] & 1U, need_a = needs[3] & 1U;
    const int64_t u_sizes[] = {in->rows, in->padded}, bias_size[] = {need_bias ? in->out : 0};
    if (!make_gradient(need_input, &in->input, &g->input, &g->d_x, error) ||
        !make_gradient(need_weight, &in->weight, &g->weight, &g->d_w, error) ||
        !make_gradient(need_a, &in->lora_a, &g->lora_a, &g->d_a, error) ||
        !make_gradient(needs[4] & 1U, &in->lora_b, &g->lora_b, &g->d_b, error) ||
        !clipft_empty(in->input.dtype, 1, bias_size, &g->bias, error) || (need_bias && !view_of(&g->bias, &g->d_bias, error)))
        return false;
    if ((need_input || need_a) && !clipft_empty(clipft_torch.aoti_torch_dtype_float32(), 2, u_sizes, &g->u, error)) return false;
    return !(need_weight && in->lora.quick_gelu) || temporary(in, in->in, &g->activated, &g->act, error);
}

static void free_gradients(lora_gradients *g)
{
    clipft_release(&g->input);
    clipft_release(&g->weight);
    clipft_release(&g->bias);
    clipft_release(&g->lora_a);
    clipft_release(&g->lora_b);
    clipft_release(&g->u);
    clipft_release(&g->activated);
}

static void zero_gradient(const clipft_tensor *t)
{
    int64_t n = 1;
    for (int64_t d = 0; d < t->ndim; ++d) n *= t->size[d];
    memset(t->data, 0, (size_t)n * (t->dtype == clipft_torch.aoti_torch_dtype_float32() ? 4 : 2));
}

/* Sums over no rows. */
static bool no_rows(const lora_gradients *g)
{
    if (g->d_w.data) zero_gradient(&g->weight);
    if (g->d_bias.data) zero_gradient(&g->bias);
    if (g->d_a.data) zero_gradient(&g->lora_a);
    if (g->d_b.data) zero_gradient(&g->lora_b);
    return true;
}

/* dA and dx, around dx's large product. */
static bool down_gradients(const lora_inputs *in, const lora_gradients *g, const clipft_view *dy)
{
    const clipft_host *host = &clipft_torch_host;
    const bool first = g->d_x.kind == CLIPFT_FLOAT32 && !in->lora.quick_gelu;
    if (!g->u.data) return true;
    if (g->d_x.data && !first && !clipft_torch_gemm(&g->d_x, NULL, dy, &in->w)) return false;
    if (!clipft_lora_gradient_down(&in->lora, host, &in->x, g->u.data, &g->d_a, &g->d_x, !first)) return false;
    return !g->d_x.data || !first || clipft_torch_gemm(&g->d_x, &g->d_x, dy, &in->w);
}

static bool weight_gradient(const lora_inputs *in, const lora_gradients *g, const clipft_view *dy)
{
    const clipft_view dy_t = clipft_view_transposed(*dy);
    if (!g->d_w.data) return true;
    if (g->act.data && !clipft_quick_gelu(&clipft_torch_host, &in->x, &g->act)) return false;
    return clipft_torch_gemm(&g->d_w, NULL, &dy_t, g->act.data ? &g->act : &in->x);
}

static bool backward_products(const lora_inputs *in, const lora_gradients *g, const clipft_view *dy, const float *rank)
{
    const clipft_host *host = &clipft_torch_host;
    if (in->rows == 0) return no_rows(g);
    if (g->u.data || g->d_b.data)
        if (!clipft_lora_gradient_up(&in->lora, host, dy, rank, g->u.data, &g->d_b)) return false;
    return down_gradients(in, g, dy) && weight_gradient(in, g, dy) && (!g->d_bias.data || clipft_column_sums(host, dy, &g->d_bias));
}

static bool check_grad(const clipft_tensor *grad, const clipft_tensor *rank, const lora_inputs *in, clipft_view *dy, clipft_error *error)
{
    char shape[96];
    if (grad->dtype != in->input.dtype || grad->ndim < 1 || !view_of(grad, dy, error) || dy->rows != in->rows || dy->cols != in->out)
        return clipft_fail(error, "grad must be [..., out], %lld rows of %lld, in the dtype of input, got shape %s", (long long)in->rows,
                           (long long)in->out, clipft_shape_text(grad, shape, sizeof shape));
    if (!clipft_check_dtype(rank, clipft_torch.aoti_torch_dtype_float32(), "float32", error)) return false;
    if (rank->ndim == 2 && rank->size[0] == in->rows && rank->size[1] == in->padded && (in->rows < 2 || rank->stride[0] == in->padded) &&
        rank->stride[1] == 1)
        return true;
    return clipft_fail(error, "rank must be what the forward pass returned, [%lld, %lld] contiguous, got shape %s", (long long)in->rows,
                       (long long)in->padded, clipft_shape_text(rank, shape, sizeof shape));
}

void clipft_op_lora_linear_backward(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "lora_linear_backward"};
    lora_inputs in = {0};
    lora_gradients g = {0};
    clipft_tensor grad, rank;
    clipft_view dy = {0};

    bool ok = take_inputs(&in, stack + 1, false, clipft_unbox_double(stack[7]), clipft_unbox_double(stack[8]), &error);
    ok &= clipft_unbox(stack[0], "grad", &grad, &error);
    ok &= clipft_unbox(stack[6], "rank", &rank, &error);
    in.lora.quick_gelu = stack[9] & 1U;
    if (!ok || !check_grad(&grad, &rank, &in, &dy, &error) || !make_gradients(&g, &in, stack + 10, &error)) goto done;
    if (!backward_products(&in, &g, &dy, rank.data)) {
        clipft_fail(&error, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    stack[0] = clipft_box(&g.input);
    stack[1] = clipft_box(&g.weight);
    stack[2] = clipft_box(&g.bias);
    stack[3] = clipft_box(&g.lora_a);
    stack[4] = clipft_box(&g.lora_b);
done:
    free_gradients(&g);
    free_inputs(&in);
    clipft_release(&grad);
    clipft_release(&rank);
    clipft_throw(&error, __FILE__, __LINE__);
}

/* ---- the mask alone ---- */

void clipft_op_dropout_mask(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "dropout_mask"};
    const int64_t sizes[] = {(int64_t)stack[1], (int64_t)stack[2]};
    clipft_tensor seed, mask = {0};
    clipft_dropout dropout;

    if (!clipft_unbox(stack[0], "seed", &seed, &error) || !take_dropout(&seed, clipft_unbox_double(stack[3]), &dropout, &error)) goto done;
    if (sizes[0] < 0 || sizes[1] < 0) {
        clipft_fail(&error, "rows and cols must not be negative, got %lld and %lld", (long long)sizes[0], (long long)sizes[1]);
        goto done;
    }
    if (!clipft_empty(clipft_torch.aoti_torch_dtype_float32(), 2, sizes, &mask, &error)) goto done;
    if (!clipft_dropout_mask(&dropout, &clipft_torch_host, mask.data, sizes[0], sizes[1])) {
        clipft_fail(&error, "torch's threads failed");
        goto done;
    }
    stack[0] = clipft_box(&mask);
done:
    clipft_release(&mask);
    clipft_release(&seed);
    clipft_throw(&error, __FILE__, __LINE__);
}
