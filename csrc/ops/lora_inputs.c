#include "lora_inputs.h"

#include <string.h>

/* ---- checks ---- */

static bool check_like_input(const clipft_tensor *t, const clipft_tensor *input, bool or_float32, clipft_error *error)
{
    if (t->dtype == input->dtype || (or_float32 && t->dtype == clipft_dtype_float32())) return clipft_check_beside(t, input, error);
    return clipft_fail(error, CLIPFT_TYPE_ERROR, "%s must have the dtype of input, %s%s, got %s", t->name, clipft_dtype_name(input->dtype),
                       or_float32 ? ", or float32" : "", clipft_dtype_name(t->dtype));
}

static bool check_shape(const clipft_tensor *t, int64_t rows, int64_t cols, const char *layout, clipft_error *error)
{
    char shape[96];
    const bool ok = t->ndim == 2 && (rows < 0 ? t->size[0] > 0 : t->size[0] == rows) && (cols < 0 ? t->size[1] > 0 : t->size[1] == cols);
    if (ok) return true;
    clipft_shape_text(t, shape, sizeof shape);
    if (rows < 0)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be %s with in = %lld, got shape %s", t->name, layout, (long long)cols,
                           shape);
    return clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be %s, [%lld, %lld], got shape %s", t->name, layout, (long long)rows,
                       (long long)cols, shape);
}

static bool check_bias(const clipft_tensor *t, const clipft_tensor *input, int64_t out, clipft_error *error)
{
    char shape[96];
    if (t->ndim == 1 && t->size[0] == 0) return true; /* none */
    if (!check_like_input(t, input, false, error)) return false;
    return (t->ndim == 1 && t->size[0] == out) || clipft_fail(error, CLIPFT_VALUE_ERROR, "bias must be [out], [%lld], got shape %s",
                                                              (long long)out, clipft_shape_text(t, shape, sizeof shape));
}

bool lora_check_dropout(const clipft_tensor *seed, double p, clipft_dropout *dropout, clipft_error *error)
{
    if (!(p >= 0.0 && p < 1.0)) return clipft_fail(error, CLIPFT_VALUE_ERROR, "dropout must be in [0, 1), got %g", p);
    *dropout = clipft_dropout_make(p, 0);
    return p == 0.0 ||
           (clipft_check_dtype(seed, clipft_dtype_int64(), "an int64 tensor", error) && clipft_check_dim(seed, 0, "0-d", error));
}

bool lora_check_mask(const int64_t *sizes, clipft_error *error)
{
    return (sizes[0] >= 0 && sizes[1] >= 0) ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "rows and cols must not be negative, got %lld and %lld", (long long)sizes[0],
                       (long long)sizes[1]);
}

bool lora_view_of(const clipft_tensor *t, clipft_view *view, clipft_error *error)
{
    return clipft_tensor_view(t, view) ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be contiguous where it has more than two dimensions", t->name);
}

static bool check_inputs(lora_inputs *in, bool has_bias, clipft_error *error)
{
    const clipft_tensor *input = &in->input;
    if (!clipft_check_features(input, error)) return false;
    in->in = input->size[input->ndim - 1];
    if (!check_like_input(&in->weight, input, false, error) || !check_shape(&in->weight, -1, in->in, "[out, in]", error)) return false;
    in->out = in->weight.size[0];
    return !has_bias || check_bias(&in->bias, input, in->out, error);
}

bool lora_check_branch(lora_inputs *in, double scaling, double dropout, bool quick_gelu, clipft_error *error)
{
    const clipft_tensor *input = &in->input;
    if (!check_like_input(&in->lora_a, input, true, error) || !check_shape(&in->lora_a, -1, in->in, "[r, in]", error)) return false;
    in->rank = in->lora_a.size[0];
    in->padded = clipft_lora_padded(in->rank);
    if (!check_like_input(&in->lora_b, input, true, error) || !check_shape(&in->lora_b, in->out, in->rank, "[out, r]", error) ||
        !lora_check_dropout(&in->seed, dropout, &in->lora.dropout, error) ||
        (dropout != 0.0 && !clipft_check_beside(&in->seed, input, error)))
        return false;
    in->lora.scale = (float)(scaling / (1.0 - dropout));
    in->lora.quick_gelu = quick_gelu;
    return lora_view_of(&in->lora_a, &in->lora.lora_a, error) && lora_view_of(&in->lora_b, &in->lora.lora_b, error);
}

/* What both ops take. */
typedef struct lora_slots {
    clipft_slot_Tensor input, weight, lora_a, lora_b, seed;
    const clipft_slot_Tensor *bias; /* NULL in the backward pass */
    double scaling, dropout;
    bool quick_gelu;
} lora_slots;

static bool take_inputs(lora_inputs *in, const lora_slots *slots, clipft_error *error)
{
    bool ok = clipft_unbox(slots->input, "input", &in->input, error);
    ok &= clipft_unbox(slots->weight, "weight", &in->weight, error);
    if (slots->bias) ok &= clipft_unbox(*slots->bias, "bias", &in->bias, error);
    ok &= clipft_unbox(slots->lora_a, "lora_a", &in->lora_a, error);
    ok &= clipft_unbox(slots->lora_b, "lora_b", &in->lora_b, error);
    ok &= clipft_unbox(slots->seed, "seed", &in->seed, error);
    ok = ok && check_inputs(in, slots->bias, error) && lora_check_branch(in, slots->scaling, slots->dropout, slots->quick_gelu, error) &&
         lora_view_of(&in->input, &in->x, error) && lora_view_of(&in->weight, &in->w, error);
    if (ok && slots->bias && in->bias.size[0] > 0) ok = lora_view_of(&in->bias, &in->bias_row, error);
    in->rows = in->x.rows;
    return ok;
}

void lora_free_inputs(lora_inputs *in)
{
    clipft_release(&in->input);
    clipft_release(&in->weight);
    clipft_release(&in->bias);
    clipft_release(&in->lora_a);
    clipft_release(&in->lora_b);
    clipft_release(&in->seed);
}

bool lora_take_forward(lora_inputs *in, const lora_linear_args *args, clipft_error *error)
{
    const lora_slots slots = {.input = args->input,
                              .weight = args->weight,
                              .lora_a = args->lora_a,
                              .lora_b = args->lora_b,
                              .seed = args->seed,
                              .bias = &args->bias,
                              .scaling = clipft_unbox_float(args->scaling),
                              .dropout = clipft_unbox_float(args->dropout),
                              .quick_gelu = clipft_unbox_bool(args->quick_gelu)};
    return take_inputs(in, &slots, error);
}

bool lora_check_grad(const clipft_tensor *grad, const lora_inputs *in, clipft_view *dy, clipft_error *error)
{
    char shape[96];
    if (grad->dtype != in->input.dtype || grad->ndim < 1 || !lora_view_of(grad, dy, error) || dy->rows != in->rows || dy->cols != in->out)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "grad must be [..., out], %lld rows of %lld, in the dtype of input, got shape %s",
                           (long long)in->rows, (long long)in->out, clipft_shape_text(grad, shape, sizeof shape));
    return clipft_check_beside(grad, &in->input, error);
}

bool lora_check_rank(const clipft_tensor *rank, const lora_inputs *in, clipft_error *error)
{
    char shape[96];
    if (!clipft_check_beside(rank, &in->input, error) || !clipft_check_dtype(rank, clipft_dtype_float32(), "float32", error)) return false;
    if (rank->ndim == 2 && rank->size[0] == in->rows && rank->size[1] == in->padded && (in->rows < 2 || rank->stride[0] == in->padded) &&
        rank->stride[1] == 1)
        return true;
    return clipft_fail(error, CLIPFT_VALUE_ERROR, "rank must be what the forward pass returned, [%lld, %lld] contiguous, got shape %s",
                       (long long)in->rows, (long long)in->padded, clipft_shape_text(rank, shape, sizeof shape));
}

bool lora_take_backward(lora_inputs *in, lora_saved *saved, const lora_linear_backward_args *args, clipft_error *error)
{
    const lora_slots slots = {.input = args->input,
                              .weight = args->weight,
                              .lora_a = args->lora_a,
                              .lora_b = args->lora_b,
                              .seed = args->seed,
                              .scaling = clipft_unbox_float(args->scaling),
                              .dropout = clipft_unbox_float(args->dropout),
                              .quick_gelu = clipft_unbox_bool(args->quick_gelu)};
    bool ok = take_inputs(in, &slots, error);
    ok &= clipft_unbox(args->grad, "grad", &saved->grad, error);
    ok &= clipft_unbox(args->rank, "rank", &saved->rank, error);
    return ok && lora_check_grad(&saved->grad, in, &saved->dy, error) && lora_check_rank(&saved->rank, in, error);
}

void lora_free_saved(lora_saved *saved)
{
    clipft_release(&saved->grad);
    clipft_release(&saved->rank);
}

/* ---- results ---- */

bool lora_make_result(const lora_inputs *in, clipft_tensor *output, clipft_view *y, clipft_error *error)
{
    int64_t sizes[CLIPFT_MAX_DIM];
    memcpy(sizes, in->input.size, sizeof sizes);
    sizes[in->input.ndim - 1] = in->out;
    return clipft_empty_view(&in->input, in->input.ndim, sizes, output, y, error);
}

bool lora_make_output(const lora_inputs *in, clipft_tensor *output, clipft_view *y, clipft_tensor *rank, clipft_error *error)
{
    const int64_t rank_sizes[] = {in->rows, in->padded};
    return lora_make_result(in, output, y, error) && clipft_empty_beside(&in->input, clipft_dtype_float32(), 2, rank_sizes, rank, error);
}

bool lora_temporary(const lora_inputs *in, int64_t cols, clipft_tensor *tensor, clipft_view *view, clipft_error *error)
{
    const int64_t sizes[] = {in->rows, cols};
    return clipft_empty_view(&in->input, 2, sizes, tensor, view, error);
}

bool lora_make_gradient(bool needed, const clipft_tensor *like, clipft_tensor *grad, clipft_view *view, clipft_error *error)
{
    const int64_t none = 0;
    if (!needed) return clipft_empty_beside(like, like->dtype, 1, &none, grad, error);
    return clipft_empty_view(like, like->ndim, like->size, grad, view, error);
}

bool lora_make_gradients(lora_gradients *g, const lora_inputs *in, const lora_linear_backward_args *args, clipft_error *error)
{
    const bool need_input = clipft_unbox_bool(args->needs_input), need_weight = clipft_unbox_bool(args->needs_weight);
    const bool need_bias = clipft_unbox_bool(args->needs_bias), need_a = clipft_unbox_bool(args->needs_a);
    const int64_t u_sizes[] = {in->rows, in->padded}, bias_size[] = {need_bias ? in->out : 0};
    if (!lora_make_gradient(need_input, &in->input, &g->input, &g->d_x, error) ||
        !lora_make_gradient(need_weight, &in->weight, &g->weight, &g->d_w, error) ||
        !lora_make_gradient(need_a, &in->lora_a, &g->lora_a, &g->d_a, error) ||
        !lora_make_gradient(clipft_unbox_bool(args->needs_b), &in->lora_b, &g->lora_b, &g->d_b, error) ||
        !clipft_empty_beside(&in->input, in->input.dtype, 1, bias_size, &g->bias, error) ||
        (need_bias && !lora_view_of(&g->bias, &g->d_bias, error)))
        return false;
    if ((need_input || need_a) && !clipft_empty_beside(&in->input, clipft_dtype_float32(), 2, u_sizes, &g->u, error)) return false;
    return !(need_weight && in->lora.quick_gelu) || lora_temporary(in, in->in, &g->activated, &g->act, error);
}

void lora_free_gradients(lora_gradients *g)
{
    clipft_release(&g->input);
    clipft_release(&g->weight);
    clipft_release(&g->bias);
    clipft_release(&g->lora_a);
    clipft_release(&g->lora_b);
    clipft_release(&g->u);
    clipft_release(&g->activated);
}

lora_linear_backward_results lora_box_gradients(lora_gradients *g)
{
    return (lora_linear_backward_results){clipft_box(&g->input), clipft_box(&g->weight), clipft_box(&g->bias), clipft_box(&g->lora_a),
                                          clipft_box(&g->lora_b)};
}

/* ---- quick_gelu alone ---- */

bool gelu_take(clipft_slot_Tensor slot, const char *name, clipft_tensor *t, clipft_view *view, clipft_error *error)
{
    char shape[96];
    if (!clipft_unbox(slot, name, t, error) || !clipft_check_float(t, error)) return false;
    if (t->ndim < 1 || t->ndim > CLIPFT_MAX_DIM)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must have 1 to %d dimensions, got shape %s", name, CLIPFT_MAX_DIM,
                           clipft_shape_text(t, shape, sizeof shape));
    return clipft_tensor_view(t, view) || clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be contiguous", name);
}

bool gelu_make_result(const clipft_tensor *like, clipft_tensor *out, clipft_view *view, clipft_error *error)
{
    return clipft_empty_view(like, like->ndim, like->size, out, view, error);
}

bool gelu_take_gradient(const quick_gelu_backward_args *args, clipft_tensor *grad, clipft_view *dy, clipft_tensor *input, clipft_view *x,
                        clipft_error *error)
{
    bool ok = gelu_take(args->grad, "grad", grad, dy, error);
    ok &= gelu_take(args->input, "input", input, x, error);
    if (ok && (dy->rows != x->rows || dy->cols != x->cols || dy->kind != x->kind))
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "grad must be like input");
    return ok && clipft_check_beside(grad, input, error);
}
