/* lora_linear: y = x W^T + b + s drop(act(x)) A^T B^T and its gradients. The products with W are torch's, the rest is kernels/lora/lora.h.
 *
 * In float32 the rank products go first: they write y with the bias in it (and dx), which the large product then adds to, as it would add
 * to a bias. In 16-bit floats they go last and add in float32 to what the large product rounded: merged into W they would vanish in its
 * rounding. */
#include "lora_inputs.h"

#include <stdlib.h>
#include <string.h>

bool lora_seed_dropout(const clipft_tensor *seed, clipft_dropout *dropout, double p, clipft_error *error)
{
    if (!dropout->active) return true;
    if (!clipft_check_cpu(seed, error)) return false;
    *dropout = clipft_dropout_make(p, *(const int64_t *)seed->data);
    return true;
}

/* ---- forward ---- */

static bool forward_products(const lora_inputs *in, const clipft_view *activated, float *rank, const clipft_view *y)
{
    const clipft_host *host = &clipft_torch_host;
    const clipft_view w_t = clipft_view_transposed(in->w), *x = activated->data ? activated : &in->x;
    if (in->rows == 0) return true;
    if (!clipft_lora_down(&in->lora, host, &in->x, activated, rank)) return false;
    if (y->kind == CLIPFT_FLOAT32) return clipft_lora_up(&in->lora, host, rank, &in->bias_row, y) && clipft_torch_gemm(y, y, x, &w_t);
    return clipft_torch_gemm(y, in->bias_row.data ? &in->bias_row : NULL, x, &w_t) && clipft_lora_up(&in->lora, host, rank, NULL, y);
}

static void run_lora_linear(const lora_linear_args *args, lora_linear_results *results, clipft_error *error)
{
    lora_inputs in = {0};
    clipft_tensor output = {0}, rank = {0}, activated = {0};
    clipft_view y = {0}, act = {0};

    if (!lora_take_forward(&in, args, error) || !clipft_check_cpu(&in.input, error) ||
        !lora_seed_dropout(&in.seed, &in.lora.dropout, clipft_unbox_float(args->dropout), error) ||
        !lora_make_output(&in, &output, &y, &rank, error) || (in.lora.quick_gelu && !lora_temporary(&in, in.in, &activated, &act, error)))
        goto done;
    if (forward_products(&in, &act, rank.data, &y))
        *results = (lora_linear_results){clipft_box(&output), clipft_box(&rank)};
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or a matrix product failed in torch");
done:
    clipft_release(&output);
    clipft_release(&rank);
    clipft_release(&activated);
    lora_free_inputs(&in);
}
CLIPFT_CPU_ENTRY(lora_linear)

/* ---- backward ---- */

void lora_zero_gradient(const clipft_tensor *t)
{
    int64_t n = 1;
    for (int64_t d = 0; d < t->ndim; ++d) n *= t->size[d];
    memset(t->data, 0, (size_t)n * (t->dtype == clipft_dtype_float32() ? 4 : 2));
}

/* Sums over no rows. */
static bool no_rows(const lora_gradients *g)
{
    if (g->d_w.data) lora_zero_gradient(&g->weight);
    if (g->d_bias.data) lora_zero_gradient(&g->bias);
    if (g->d_a.data) lora_zero_gradient(&g->lora_a);
    if (g->d_b.data) lora_zero_gradient(&g->lora_b);
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

static void run_lora_linear_backward(const lora_linear_backward_args *args, lora_linear_backward_results *results, clipft_error *error)
{
    lora_inputs in = {0};
    lora_saved saved = {0};
    lora_gradients g = {0};

    if (lora_take_backward(&in, &saved, args, error) && clipft_check_cpu(&in.input, error) &&
        lora_seed_dropout(&in.seed, &in.lora.dropout, clipft_unbox_float(args->dropout), error) &&
        lora_make_gradients(&g, &in, args, error)) {
        if (backward_products(&in, &g, &saved.dy, saved.rank.data))
            *results = lora_box_gradients(&g);
        else
            clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or a matrix product failed in torch");
    }
    lora_free_gradients(&g);
    lora_free_inputs(&in);
    lora_free_saved(&saved);
}
CLIPFT_CPU_ENTRY(lora_linear_backward)

/* ---- the mask alone ---- */

static void run_dropout_mask(const dropout_mask_args *args, dropout_mask_results *results, clipft_error *error)
{
    const int64_t sizes[] = {clipft_unbox_int(args->rows), clipft_unbox_int(args->cols)};
    const double p = clipft_unbox_float(args->dropout);
    clipft_tensor seed, mask = {0};
    clipft_dropout dropout;

    if (!clipft_unbox(args->seed, "seed", &seed, error) || !lora_check_dropout(&seed, p, &dropout, error) ||
        !lora_seed_dropout(&seed, &dropout, p, error) || !lora_check_mask(sizes, error) ||
        !clipft_empty(clipft_dtype_float32(), 2, sizes, &mask, error))
        goto done;
    if (clipft_dropout_mask(&dropout, &clipft_torch_host, mask.data, sizes[0], sizes[1]))
        results->result = clipft_box(&mask);
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "torch's threads failed");
done:
    clipft_release(&mask);
    clipft_release(&seed);
}
CLIPFT_CPU_ENTRY(dropout_mask)
