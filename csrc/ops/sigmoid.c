/* torch.ops.clipft.sigmoid_loss and its parts: see kernels/loss/sigmoid.c for the mathematics. */
#include "loss_inputs.h"

#include <stdlib.h>

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

static void forward(const loss_slots *embeds, clipft_slot_Tensor bias, clipft_slot_Tensor labels, bool keep, sigmoid_loss_results *results,
                    clipft_error *error)
{
    loss_inputs in = {0};
    term_inputs t = {0};
    clipft_tensor loss = {0}, tiles = {0};
    double value = 0.0;

    bool ok = loss_inputs_take(&in, embeds, error);
    ok = take_terms(&t, bias, labels, &in, ok, error) && loss_keep_tiles(&in, keep, &tiles, error);
    if (!ok) goto done;

    if (!clipft_sigmoid_forward(&in.logits, &t.terms, &clipft_torch_host, &value))
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or a matrix product failed in torch");
    else if (loss_result(clipft_dtype_float32(), value, &loss, error))
        *results = (sigmoid_loss_results){clipft_box(&loss), clipft_box(&tiles)};
done:
    clipft_release(&loss);
    clipft_release(&tiles);
    free_terms(&t);
    loss_inputs_free(&in);
}

static void run_sigmoid_loss(const sigmoid_loss_args *args, sigmoid_loss_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, false, 0};
    forward(&embeds, args->logit_bias, args->labels, clipft_unbox_bool(args->keep_tiles), results, error);
}
CLIPFT_CPU_ENTRY(sigmoid_loss)

static void run_sigmoid_loss_shard(const sigmoid_loss_shard_args *args, sigmoid_loss_shard_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    sigmoid_loss_results whole = {0};
    forward(&embeds, args->logit_bias, args->labels, clipft_unbox_bool(args->keep_tiles), &whole, error);
    *results = (sigmoid_loss_shard_results){whole.loss, whole.tiles};
}
CLIPFT_CPU_ENTRY(sigmoid_loss_shard)

static void run_sigmoid_loss_backward(const sigmoid_loss_backward_args *args, sigmoid_loss_backward_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const bool needs_image = clipft_unbox_bool(args->needs_image), needs_text = clipft_unbox_bool(args->needs_text);
    loss_inputs in = {0};
    term_inputs t = {0};
    loss_gradients grad = {0};
    clipft_tensor upstream, tiles, d_scale = {0}, d_bias = {0};
    float grad_value = 0.0F;
    double scale_value = 0.0, d_bias_value = 0.0;

    bool ok = loss_inputs_take(&in, &embeds, error);
    ok = take_terms(&t, args->logit_bias, args->labels, &in, ok, error);
    ok &= clipft_unbox(args->grad, "grad", &upstream, error);
    ok &= clipft_unbox(args->tiles, "tiles", &tiles, error);
    ok = ok && loss_scalar(&upstream, &in.image, &grad_value, error) && loss_reuse_tiles(&in, &tiles, error) &&
         loss_gradients_make(&grad, &in, needs_image, needs_text, error);
    if (!ok) goto done;

    if (!clipft_sigmoid_backward(&in.logits, &t.terms, &clipft_torch_host, (double)grad_value, grad.image_f, grad.text_f, &scale_value,
                                 &d_bias_value)) {
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    loss_gradients_finish(&grad);
    if (loss_result(clipft_dtype_float32(), scale_value, &d_scale, error) &&
        loss_result(clipft_dtype_float32(), d_bias_value, &d_bias, error))
        *results =
            (sigmoid_loss_backward_results){clipft_box(&grad.image), clipft_box(&grad.text), clipft_box(&d_scale), clipft_box(&d_bias)};
done:
    loss_gradients_free(&grad);
    clipft_release(&d_scale);
    clipft_release(&d_bias);
    clipft_release(&upstream);
    clipft_release(&tiles);
    free_terms(&t);
    loss_inputs_free(&in);
}
CLIPFT_CPU_ENTRY(sigmoid_loss_backward)
