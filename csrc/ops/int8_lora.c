/* int8_lora_linear: y = act(x)^ W^T + b + s drop(act(x)) A^T B^T with frozen int8 weights, and its gradients. A layer comes as two
 * packings, of the weight and of its transpose; without a branch lora_a and lora_b are empty. The work is kernels/int8/int8_lora.h. */
#include "../kernels/int8/int8_lora.h"
#include "lora_inputs.h"
#include "quantized_inputs.h"

#include <string.h>

typedef struct layer_inputs {
    lora_inputs base; /* input, lora_a, lora_b, seed and what is made of them */
    int8_layer_tensors tensors;
    clipft_tensor packed_t;
    clipft_int8_lora layer;
    bool branch;
} layer_inputs;

static bool is_empty(const clipft_tensor *t) { return t->ndim == 1 && t->size[0] == 0; }

static void free_inputs(layer_inputs *in)
{
    lora_free_inputs(&in->base);
    clipft_release(&in->tensors.weight);
    clipft_release(&in->tensors.scale);
    clipft_release(&in->tensors.bias);
    clipft_release(&in->packed_t);
}

/* What both ops take, whose dropout and scaling stand beside it. */
typedef struct shared_slots {
    clipft_slot_Tensor input, packed_t, weight_scale, lora_a, lora_b, seed;
} shared_slots;

static bool unbox_shared(layer_inputs *in, const shared_slots *slots, clipft_error *error)
{
    bool ok = clipft_unbox(slots->input, "input", &in->base.input, error);
    ok &= clipft_unbox(slots->packed_t, "packed_t", &in->packed_t, error);
    ok &= clipft_unbox(slots->weight_scale, "weight_scale", &in->tensors.scale, error);
    ok &= clipft_unbox(slots->lora_a, "lora_a", &in->base.lora_a, error);
    ok &= clipft_unbox(slots->lora_b, "lora_b", &in->base.lora_b, error);
    ok &= clipft_unbox(slots->seed, "seed", &in->base.seed, error);
    return ok;
}

/* The branch, where there is one, of a layer whose in and out are known. */
static bool check_branch(layer_inputs *in, double scaling, double dropout, bool quick_gelu, clipft_error *error)
{
    in->branch = !is_empty(&in->base.lora_a);
    in->base.lora.quick_gelu = quick_gelu;
    if (!in->branch && !is_empty(&in->base.lora_b)) return clipft_fail(error, CLIPFT_VALUE_ERROR, "lora_a and lora_b must come together");
    if (in->branch && (!lora_check_branch(&in->base, scaling, dropout, quick_gelu, error) ||
                       !lora_seed_dropout(&in->base.seed, &in->base.lora.dropout, dropout, error)))
        return false;
    in->layer.lora = in->base.lora;
    return true;
}

/* ---- forward ---- */

static bool check_forward(layer_inputs *in, const int8_lora_linear_args *args, clipft_error *error)
{
    const clipft_tensor *input = &in->base.input;
    clipft_int8_layer *layer = &in->layer.layer, transpose;
    if (!clipft_check_features(input, error) || !clipft_check_cpu(input, error) ||
        !int8_check_packed(&in->tensors.weight, input, layer, error) || !int8_check_packed(&in->packed_t, input, &transpose, error))
        return false;
    if (transpose.out != layer->in || transpose.in != layer->out)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "packed_t must be of the transpose, [%lld, %lld], got [%lld, %lld]",
                           (long long)layer->in, (long long)layer->out, (long long)transpose.out, (long long)transpose.in);
    in->base.in = layer->in, in->base.out = layer->out;
    if (!int8_check_features(input, layer->in, error) || !int8_check_layer(&in->tensors, input, CLIPFT_NO_ACTIVATION, layer, error) ||
        !lora_view_of(input, &in->base.x, error))
        return false;
    in->base.rows = in->base.x.rows;
    return check_branch(in, clipft_unbox_float(args->scaling), clipft_unbox_float(args->dropout), clipft_unbox_bool(args->quick_gelu),
                        error);
}

static bool take_forward(layer_inputs *in, const int8_lora_linear_args *args, clipft_error *error)
{
    const shared_slots slots = {args->input, args->packed_t, args->weight_scale, args->lora_a, args->lora_b, args->seed};
    bool ok = unbox_shared(in, &slots, error);
    ok &= clipft_unbox(args->packed, "packed", &in->tensors.weight, error);
    ok &= clipft_unbox(args->bias, "bias", &in->tensors.bias, error);
    return ok && check_forward(in, args, error);
}

/* [rows, padded], or empty without a branch. */
static bool make_rank(const layer_inputs *in, clipft_tensor *rank, clipft_error *error)
{
    const int64_t sizes[] = {in->branch ? in->base.rows : 0, in->base.padded};
    return clipft_empty_beside(&in->base.input, clipft_dtype_float32(), in->branch ? 2 : 1, sizes, rank, error);
}

static void run_int8_lora_linear(const int8_lora_linear_args *args, int8_lora_linear_results *results, clipft_error *error)
{
    layer_inputs in = {0};
    clipft_tensor output = {0}, rank = {0};
    clipft_view y = {0};

    if (!take_forward(&in, args, error) || !lora_make_result(&in.base, &output, &y, error) || !make_rank(&in, &rank, error)) goto done;
    if (clipft_int8_lora_forward(&in.layer, &clipft_torch_host, &in.base.x, rank.data, &y))
        *results = (int8_lora_linear_results){clipft_box(&output), clipft_box(&rank)};
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or torch's threads failed");
done:
    clipft_release(&output);
    clipft_release(&rank);
    free_inputs(&in);
}
CLIPFT_CPU_ENTRY(int8_lora_linear)

/* ---- backward ---- */

typedef struct gradients {
    clipft_tensor input, bias, lora_a, lora_b, u; /* [0] where not wanted; u is work space */
    clipft_int8_lora_gradients views;
} gradients;

static void free_gradients(gradients *g)
{
    clipft_release(&g->input);
    clipft_release(&g->bias);
    clipft_release(&g->lora_a);
    clipft_release(&g->lora_b);
    clipft_release(&g->u);
}

/* A layer from out to in. The input may be empty where nothing is made of it. */
static bool check_backward(layer_inputs *in, lora_saved *saved, const int8_lora_linear_backward_args *args, clipft_error *error)
{
    clipft_int8_layer *layer = &in->layer.layer;
    const clipft_tensor *grad = &saved->grad;
    const bool quick_gelu = clipft_unbox_bool(args->quick_gelu);
    if (!clipft_check_float(grad, error) || !clipft_check_cpu(grad, error) || !int8_check_packed(&in->packed_t, grad, layer, error))
        return false;
    if (layer->out != clipft_unbox_int(args->features))
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "packed_t must be of %lld features, got %lld",
                           (long long)clipft_unbox_int(args->features), (long long)layer->out);
    in->base.in = layer->out, in->base.out = layer->in;
    const int8_layer_tensors scale = {.scale = in->tensors.scale, .bias = {.ndim = 1}};
    clipft_int8_layer forward = {.out = layer->in};
    if (!int8_check_layer(&scale, grad, CLIPFT_NO_ACTIVATION, &forward, error)) return false;
    in->layer.factor = forward.scale;
    if (is_empty(&in->base.input) && is_empty(&in->base.lora_a) && !quick_gelu) {
        if (grad->ndim < 1 || !lora_view_of(grad, &saved->dy, error) || saved->dy.cols != in->base.out)
            return clipft_fail(error, CLIPFT_VALUE_ERROR, "grad must be [..., %lld]", (long long)in->base.out);
        in->base.rows = saved->dy.rows;
        return true;
    }
    if (!clipft_check_features(&in->base.input, error) || !int8_check_features(&in->base.input, in->base.in, error) ||
        !lora_view_of(&in->base.input, &in->base.x, error))
        return false;
    in->base.rows = in->base.x.rows;
    if (!check_branch(in, clipft_unbox_float(args->scaling), clipft_unbox_float(args->dropout), quick_gelu, error)) return false;
    return lora_check_grad(grad, &in->base, &saved->dy, error) && (!in->branch || lora_check_rank(&saved->rank, &in->base, error));
}

static bool take_backward(layer_inputs *in, lora_saved *saved, const int8_lora_linear_backward_args *args, clipft_error *error)
{
    const shared_slots slots = {args->input, args->packed_t, args->weight_scale, args->lora_a, args->lora_b, args->seed};
    bool ok = unbox_shared(in, &slots, error);
    ok &= clipft_unbox(args->grad, "grad", &saved->grad, error);
    ok &= clipft_unbox(args->rank, "rank", &saved->rank, error);
    return ok && check_backward(in, saved, args, error);
}

static bool make_gradients(gradients *g, const layer_inputs *in, const clipft_tensor *grad, const int8_lora_linear_backward_args *args,
                           clipft_error *error)
{
    const bool need_input = clipft_unbox_bool(args->needs_input), need_bias = clipft_unbox_bool(args->needs_bias);
    const bool need_a = in->branch && clipft_unbox_bool(args->needs_a), need_b = in->branch && clipft_unbox_bool(args->needs_b);
    clipft_tensor input = *grad, bias = {.ndim = 1, .size = {in->base.out}, .dtype = clipft_dtype_float32()};
    const int64_t u_sizes[] = {in->base.rows, in->base.padded};
    input.size[input.ndim - 1] = in->base.in;
    bias.device = grad->device, bias.index = grad->index;
    return lora_make_gradient(need_input, &input, &g->input, &g->views.x, error) &&
           lora_make_gradient(need_bias, &bias, &g->bias, &g->views.bias, error) &&
           lora_make_gradient(need_a, &in->base.lora_a, &g->lora_a, &g->views.lora_a, error) &&
           lora_make_gradient(need_b, &in->base.lora_b, &g->lora_b, &g->views.lora_b, error) &&
           (!(in->branch && (need_input || need_a)) || clipft_empty_beside(grad, clipft_dtype_float32(), 2, u_sizes, &g->u, error));
}

/* Sums over no rows. */
static bool no_rows(const gradients *g)
{
    if (g->views.bias.data) lora_zero_gradient(&g->bias);
    if (g->views.lora_a.data) lora_zero_gradient(&g->lora_a);
    if (g->views.lora_b.data) lora_zero_gradient(&g->lora_b);
    return true;
}

static void run_int8_lora_linear_backward(const int8_lora_linear_backward_args *args, int8_lora_linear_backward_results *results,
                                          clipft_error *error)
{
    layer_inputs in = {0};
    lora_saved saved = {0};
    gradients g = {0};

    if (!take_backward(&in, &saved, args, error) || !make_gradients(&g, &in, &saved.grad, args, error)) goto done;
    if (in.base.rows == 0
            ? no_rows(&g)
            : clipft_int8_lora_backward(&in.layer, &clipft_torch_host, &in.base.x, &saved.dy, saved.rank.data, g.u.data, &g.views))
        *results =
            (int8_lora_linear_backward_results){clipft_box(&g.input), clipft_box(&g.bias), clipft_box(&g.lora_a), clipft_box(&g.lora_b)};
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or torch's threads failed");
done:
    free_gradients(&g);
    lora_free_saved(&saved);
    free_inputs(&in);
}
CLIPFT_CPU_ENTRY(int8_lora_linear_backward)
