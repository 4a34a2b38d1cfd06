/* torch.ops.clipft.sigmoid_loss and its parts: see kernels/loss/sigmoid.c for the mathematics. */
#include "loss_inputs.h"

#include <stdlib.h>
#include <string.h>

typedef struct term_inputs {
    clipft_tensor bias, labels;
    int32_t *ids;
    clipft_sigmoid_terms terms;
} term_inputs;

static bool take_terms(term_inputs *t, clipft_slot_Tensor bias, clipft_slot_Tensor labels, const loss_inputs *in, bool ok,
                       clipft_error *error)
{
    ok &= clipft_unbox(bias, "logit_bias", &t->bias, error);
    ok &= clipft_unbox(labels, "labels", &t->labels, error);
    if (!ok || !loss_scalar(&t->bias, &in->image, &t->terms.bias, error) || !loss_check_labels(&t->labels, in, error)) return false;
    if (t->labels.size[0] == 0) return true;
    t->ids = malloc((size_t)t->labels.size[0] * sizeof *t->ids);
    t->terms.class_ids = t->ids;
    return t->ids ? loss_number_classes(&t->labels, t->ids, NULL, error)
                  : clipft_fail(error, CLIPFT_OUT_OF_MEMORY, "no memory for %lld labels", (long long)t->labels.size[0]);
}

static void free_terms(term_inputs *t)
{
    free(t->ids);
    clipft_release(&t->bias);
    clipft_release(&t->labels);
}

static bool compute(const loss_inputs *in, const sigmoid_needs *needs, const clipft_sigmoid_terms *terms, loss_gradients *grad,
                    sigmoid_loss_results *results, clipft_error *error)
{
    const int64_t count = needs->any ? 2 : 0;
    clipft_tensor loss = {0}, scalars = {0};
    double value = 0.0, scale = 0.0, bias = 0.0;
    const clipft_sigmoid_gradients wanted = {grad->image_f, grad->text_f, &scale, &bias};
    if (!clipft_sigmoid(&in->logits, terms, &clipft_torch_host, &value, needs->any ? &wanted : NULL))
        return clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or a matrix product failed in torch");
    const bool ok =
        loss_result(clipft_dtype_float32(), value, &loss, error) && clipft_empty(clipft_dtype_float32(), 1, &count, &scalars, error);
    if (ok && needs->any) memcpy(scalars.data, (const float[]){(float)scale, (float)bias}, 2 * sizeof(float));
    if (ok) *results = (sigmoid_loss_results){clipft_box(&loss), clipft_box(&grad->image), clipft_box(&grad->text), clipft_box(&scalars)};
    clipft_release(&loss);
    clipft_release(&scalars);
    return ok;
}

static void run(const loss_slots *embeds, const sigmoid_needs *needs, clipft_slot_Tensor bias, clipft_slot_Tensor labels,
                sigmoid_loss_results *results, clipft_error *error)
{
    loss_inputs in = {0};
    term_inputs t = {0};
    loss_gradients grad = {0};

    bool ok = loss_inputs_take(&in, embeds, error);
    ok = take_terms(&t, bias, labels, &in, ok, error) &&
         loss_gradients_make(&grad, &in, needs->image, needs->text, clipft_dtype_float32(), error);
    if (ok) compute(&in, needs, &t.terms, &grad, results, error);
    loss_gradients_free(&grad);
    free_terms(&t);
    loss_inputs_free(&in);
}

static void run_sigmoid_loss(const sigmoid_loss_args *args, sigmoid_loss_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, false, 0};
    const sigmoid_needs needs = sigmoid_needs_of(args->needs_image, args->needs_text, args->needs_scalars);
    run(&embeds, &needs, args->logit_bias, args->labels, results, error);
}
CLIPFT_CPU_ENTRY(sigmoid_loss)

static void run_sigmoid_loss_shard(const sigmoid_loss_shard_args *args, sigmoid_loss_shard_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const sigmoid_needs needs = sigmoid_needs_of(args->needs_image, args->needs_text, args->needs_scalars);
    sigmoid_loss_results whole = {0};
    run(&embeds, &needs, args->logit_bias, args->labels, &whole, error);
    *results = (sigmoid_loss_shard_results){whole.loss, whole.image, whole.text, whole.scalars};
}
CLIPFT_CPU_ENTRY(sigmoid_loss_shard)
