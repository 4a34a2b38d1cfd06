/* torch.ops.clipft.contrastive_loss and its parts: see kernels/loss/contrastive.c for the mathematics. */
#include "loss_inputs.h"
#include "ops.h"

#include <stdlib.h>

typedef struct target_inputs {
    clipft_tensor labels;
    int32_t *ids;
    float *weight;
    clipft_targets targets;
} target_inputs;

typedef struct labelled {
    int64_t label, index;
} labelled;

static int by_label(const void *a, const void *b)
{
    const int64_t x = ((const labelled *)a)->label, y = ((const labelled *)b)->label;
    return (x > y) - (x < y);
}

/* Labels of any value become class ids 0, 1, ... and 1 / size of the class. */
static bool number_classes(target_inputs *t, int64_t n, clipft_error *error)
{
    labelled *order = malloc((size_t)n * sizeof *order);
    t->ids = malloc((size_t)n * sizeof *t->ids);
    t->weight = malloc((size_t)n * sizeof *t->weight);
    const bool ok = order && t->ids && t->weight;
    if (!ok) clipft_fail(error, "no memory for %lld labels", (long long)n);
    for (int64_t i = 0; ok && i < n; ++i) order[i] = (labelled){((const int64_t *)t->labels.data)[i * t->labels.stride[0]], i};
    if (ok) qsort(order, (size_t)n, sizeof *order, by_label);
    int32_t id = 0;
    for (int64_t begin = 0, end = 0; ok && begin < n; begin = end, ++id) {
        while (end < n && order[end].label == order[begin].label) ++end;
        for (int64_t k = begin; k < end; ++k) {
            t->ids[order[k].index] = id;
            t->weight[order[k].index] = 1.0F / (float)(end - begin);
        }
    }
    free(order);
    return ok;
}

/* Slots 3 and 4: labels (none when empty) and label_smoothing. */
static bool take_targets(target_inputs *t, const StableIValue *stack, const loss_inputs *in, bool ok, clipft_error *error)
{
    const int64_t n = in->logits.text.rows;
    const double smoothing = clipft_unbox_double(stack[4]);
    ok &= clipft_unbox(stack[3], "labels", &t->labels, error);
    if (!ok || !loss_check_targets(&t->labels, smoothing, in, error)) return false;
    t->targets.smoothing = (float)smoothing;
    if (t->labels.ndim == 1 && t->labels.size[0] == 0) return true;
    if (!number_classes(t, n, error)) return false;
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

static void forward(StableIValue *stack, bool shard, clipft_error *error)
{
    enum { LOSS, ROW_LSE, COL_LSE, TARGET, TILES, RESULTS };
    loss_inputs in = {0};
    target_inputs t = {0};
    clipft_tensor out[RESULTS] = {0};
    const int32_t f64 = clipft_torch.aoti_torch_dtype_float64();
    const bool keep = stack[5] & 1U;

    bool ok = loss_inputs_take(&in, stack, shard, shard ? (int64_t)stack[6] : 0, error);
    ok = take_targets(&t, stack, &in, ok, error);
    if (!ok) goto done;
    ok = clipft_empty(f64, 1, &in.logits.image.rows, &out[ROW_LSE], error) &&
         clipft_empty(f64, 1, &in.logits.text.rows, &out[COL_LSE], error) && loss_keep_tiles(&in, keep, &out[TILES], error);
    if (!ok) goto done;

    double target = 0.0;
    if (!clipft_contrastive_forward(&in.logits, &t.targets, &clipft_torch_host, out[ROW_LSE].data, out[COL_LSE].data, &target)) {
        clipft_fail(error, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    if (loss_result(clipft_torch.aoti_torch_dtype_float32(), forward_value(&in, out[ROW_LSE].data, out[COL_LSE].data, target), &out[LOSS],
                    error) &&
        loss_result(f64, target, &out[TARGET], error))
        for (int k = 0; k < RESULTS; ++k) stack[k] = clipft_box(&out[k]);
done:
    for (int k = 0; k < RESULTS; ++k) clipft_release(&out[k]);
    free_targets(&t);
    loss_inputs_free(&in);
}

void clipft_op_contrastive_loss(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "contrastive_loss"};
    forward(stack, false, &error);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_op_contrastive_loss_shard(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "contrastive_loss_shard"};
    forward(stack, true, &error);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_op_contrastive_loss_backward(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "contrastive_loss_backward"};
    loss_inputs in = {0};
    target_inputs t = {0};
    loss_gradients grad = {0};
    clipft_tensor upstream, row_lse, col_lse, tiles, d_scale = {0};
    float grad_value = 0.0F;
    double scale_value = 0.0;

    bool ok = loss_inputs_take(&in, stack + 1, true, (int64_t)stack[6], &error);
    ok = take_targets(&t, stack + 1, &in, ok, &error);
    ok &= clipft_unbox(stack[0], "grad", &upstream, &error);
    ok &= clipft_unbox(stack[7], "row_lse", &row_lse, &error);
    ok &= clipft_unbox(stack[8], "col_lse", &col_lse, &error);
    ok &= clipft_unbox(stack[9], "tiles", &tiles, &error);
    ok = ok && loss_scalar(&upstream, &in.image, &grad_value, &error) && loss_check_lse(&row_lse, in.logits.image.rows, &error) &&
         loss_check_lse(&col_lse, in.logits.text.rows, &error) && loss_reuse_tiles(&in, &tiles, &error) &&
         loss_gradients_make(&grad, &in, stack[10] & 1U, stack[11] & 1U, &error);
    if (!ok) goto done;

    if (!clipft_contrastive_backward(&in.logits, &t.targets, &clipft_torch_host, row_lse.data, col_lse.data, (double)grad_value,
                                     grad.image_f, grad.text_f, &scale_value)) {
        clipft_fail(&error, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    loss_gradients_finish(&grad);
    if (loss_result(clipft_torch.aoti_torch_dtype_float32(), scale_value, &d_scale, &error)) {
        stack[0] = clipft_box(&grad.image);
        stack[1] = clipft_box(&grad.text);
        stack[2] = clipft_box(&d_scale);
    }
done:
    loss_gradients_free(&grad);
    free_targets(&t);
    loss_inputs_free(&in);
    clipft_release(&upstream);
    clipft_release(&row_lse);
    clipft_release(&col_lse);
    clipft_release(&tiles);
    clipft_release(&d_scale);
    clipft_throw(&error, __FILE__, __LINE__);
}
