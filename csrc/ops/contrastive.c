/* torch.ops.clipft.contrastive_loss and its parts: see kernels/loss/contrastive.c for the mathematics. */
#include "loss_inputs.h"

#include <stdlib.h>

typedef struct target_inputs {
    clipft_tensor labels;
    int32_t *ids;
    float *weight;
    clipft_targets targets;
} target_inputs;

static bool take_targets(target_inputs *t, const target_slots *slots, const loss_inputs *in, bool ok, clipft_error *error)
{
    const int64_t n = in->logits.text.rows;
    const double smoothing = clipft_unbox_float(slots->label_smoothing);
    ok &= clipft_unbox(slots->labels, "labels", &t->labels, error);
    if (!ok || !loss_check_targets(&t->labels, smoothing, in, error)) return false;
    t->targets.smoothing = (float)smoothing;
    if (t->labels.ndim == 1 && t->labels.size[0] == 0) return true;
    t->ids = malloc((size_t)n * sizeof *t->ids);
    t->weight = malloc((size_t)n * sizeof *t->weight);
    if (!t->ids || !t->weight) return clipft_fail(error, CLIPFT_OUT_OF_MEMORY, "no memory for %lld labels", (long long)n);
    if (!loss_number_classes(&t->labels, t->ids, t->weight, error)) return false;
    t->targets.class_ids = t->ids;
    t->targets.class_weight = t->weight;
    return true;
}

static void free_targets(target_inputs *t)
{
    free(t->ids);
    free(t->weight);
    clipft_release(&t->labels);
}

static double forward_value(const loss_inputs *in, const double *row_lse, const double *col_lse, double target)
{
    double sum = -2.0 * target;
    for (int64_t i = 0; i < in->logits.image.rows; ++i) sum += row_lse[i];
    for (int64_t j = 0; j < in->logits.text.rows; ++j) sum += col_lse[j];
    return sum / (2.0 * (double)in->logits.text.rows);
}

static void forward(const loss_slots *embeds, const target_slots *targets, bool keep, contrastive_loss_results *results,
                    clipft_error *error)
{
    loss_inputs in = {0};
    target_inputs t = {0};
    clipft_tensor loss = {0}, row_lse = {0}, col_lse = {0}, target = {0}, tiles = {0};
    double target_value = 0.0;

    bool ok = loss_inputs_take(&in, embeds, error);
    ok = take_targets(&t, targets, &in, ok, error);
    if (!ok) goto done;
    ok = clipft_empty(clipft_dtype_float64(), 1, &in.logits.image.rows, &row_lse, error) &&
         clipft_empty(clipft_dtype_float64(), 1, &in.logits.text.rows, &col_lse, error) && loss_keep_tiles(&in, keep, &tiles, error);
    if (!ok) goto done;

    if (!clipft_contrastive_forward(&in.logits, &t.targets, &clipft_torch_host, row_lse.data, col_lse.data, &target_value)) {
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    if (loss_result(clipft_dtype_float32(), forward_value(&in, row_lse.data, col_lse.data, target_value), &loss, error) &&
        loss_result(clipft_dtype_float64(), target_value, &target, error))
        *results = (contrastive_loss_results){clipft_box(&loss), clipft_box(&row_lse), clipft_box(&col_lse), clipft_box(&target),
                                              clipft_box(&tiles)};
done:
    clipft_release(&loss);
    clipft_release(&row_lse);
    clipft_release(&col_lse);
    clipft_release(&target);
    clipft_release(&tiles);
    free_targets(&t);
    loss_inputs_free(&in);
}

static void run_contrastive_loss(const contrastive_loss_args *args, contrastive_loss_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, false, 0};
    const target_slots targets = {args->labels, args->label_smoothing};
    forward(&embeds, &targets, clipft_unbox_bool(args->keep_tiles), results, error);
}
CLIPFT_CPU_ENTRY(contrastive_loss)

static void run_contrastive_loss_shard(const contrastive_loss_shard_args *args, contrastive_loss_shard_results *results,
                                       clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const target_slots targets = {args->labels, args->label_smoothing};
    contrastive_loss_results whole = {0};
    forward(&embeds, &targets, clipft_unbox_bool(args->keep_tiles), &whole, error);
    *results = (contrastive_loss_shard_results){whole.loss, whole.row_lse, whole.col_lse, whole.target, whole.tiles};
}
CLIPFT_CPU_ENTRY(contrastive_loss_shard)

static void run_contrastive_loss_backward(const contrastive_loss_backward_args *args, contrastive_loss_backward_results *results,
                                          clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const target_slots targets = {args->labels, args->label_smoothing};
    const bool needs_image = clipft_unbox_bool(args->needs_image), needs_text = clipft_unbox_bool(args->needs_text);
    loss_inputs in = {0};
    target_inputs t = {0};
    loss_gradients grad = {0};
    clipft_tensor upstream, row_lse, col_lse, tiles, d_scale = {0};
    float grad_value = 0.0F;
    double scale_value = 0.0;

    bool ok = loss_inputs_take(&in, &embeds, error);
    ok = take_targets(&t, &targets, &in, ok, error);
    ok &= clipft_unbox(args->grad, "grad", &upstream, error);
    ok &= clipft_unbox(args->row_lse, "row_lse", &row_lse, error);
    ok &= clipft_unbox(args->col_lse, "col_lse", &col_lse, error);
    ok &= clipft_unbox(args->tiles, "tiles", &tiles, error);
    ok = ok && loss_scalar(&upstream, &in.image, &grad_value, error) && loss_check_lse(&row_lse, in.logits.image.rows, error) &&
         loss_check_lse(&col_lse, in.logits.text.rows, error) && loss_reuse_tiles(&in, &tiles, error) &&
         loss_gradients_make(&grad, &in, needs_image || !needs_text, needs_text, in.image.dtype, error);
    if (!ok) goto done;

    if (!clipft_contrastive_backward(&in.logits, &t.targets, &clipft_torch_host, row_lse.data, col_lse.data, (double)grad_value,
                                     grad.image_f, grad.text_f, &scale_value)) {
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    loss_gradients_finish(&grad);
    if (loss_result(clipft_dtype_float32(), scale_value, &d_scale, error))
        *results = (contrastive_loss_backward_results){clipft_box(&grad.image), clipft_box(&grad.text), clipft_box(&d_scale)};
done:
    loss_gradients_free(&grad);
    free_targets(&t);
    loss_inputs_free(&in);
    clipft_release(&upstream);
    clipft_release(&row_lse);
    clipft_release(&col_lse);
    clipft_release(&tiles);
    clipft_release(&d_scale);
}
CLIPFT_CPU_ENTRY(contrastive_loss_backward)
