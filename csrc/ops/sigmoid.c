/* torch.ops.clipft.sigmoid_loss and its parts: see kernels/loss/sigmoid.c for the mathematics. */
#include "loss_inputs.h"
#include "ops.h"

static bool take_bias(const StableIValue slot, const loss_inputs *in, clipft_tensor *bias, float *value, bool ok, clipft_error *error)
{
    ok &= clipft_unbox(slot, "logit_bias", bias, error);
    return ok && loss_scalar(bias, &in->image, value, error);
}

static void forward(StableIValue *stack, bool shard, clipft_error *error)
{
    loss_inputs in = {0};
    clipft_tensor bias = {0}, loss = {0}, tiles = {0};
    float bias_value = 0.0F;
    double value = 0.0;
    const bool keep = stack[4] & 1U;

    bool ok = loss_inputs_take(&in, stack, shard, shard ? (int64_t)stack[5] : 0, error);
    ok = take_bias(stack[3], &in, &bias, &bias_value, ok, error) && loss_keep_tiles(&in, keep, &tiles, error);
    if (!ok) goto done;

    if (!clipft_sigmoid_forward(&in.logits, bias_value, &clipft_torch_host, &value))
        clipft_fail(error, "out of memory, or a matrix product failed in torch");
    else if (loss_result(clipft_torch.aoti_torch_dtype_float32(), value, &loss, error)) {
        stack[0] = clipft_box(&loss);
        stack[1] = clipft_box(&tiles);
    }
done:
    clipft_release(&loss);
    clipft_release(&tiles);
    clipft_release(&bias);
    loss_inputs_free(&in);
}

void clipft_op_sigmoid_loss(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "sigmoid_loss"};
    forward(stack, false, &error);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_op_sigmoid_loss_shard(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "sigmoid_loss_shard"};
    forward(stack, true, &error);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_op_sigmoid_loss_backward(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "sigmoid_loss_backward"};
    loss_inputs in = {0};
    loss_gradients grad = {0};
    clipft_tensor upstream, tiles, bias, d_scale = {0}, d_bias = {0};
    float grad_value = 0.0F, bias_value = 0.0F;
    double scale_value = 0.0, d_bias_value = 0.0;

    bool ok = loss_inputs_take(&in, stack + 1, true, (int64_t)stack[5], &error);
    ok = take_bias(stack[4], &in, &bias, &bias_value, ok, &error);
    ok &= clipft_unbox(stack[0], "grad", &upstream, &error);
    ok &= clipft_unbox(stack[6], "tiles", &tiles, &error);
    ok = ok && loss_scalar(&upstream, &in.image, &grad_value, &error) && loss_reuse_tiles(&in, &tiles, &error) &&
         loss_gradients_make(&grad, &in, stack[7] & 1U, stack[8] & 1U, &error);
    if (!ok) goto done;

    if (!clipft_sigmoid_backward(&in.logits, bias_value, &clipft_torch_host, (double)grad_value, grad.image_f, grad.text_f, &scale_value,
                                 &d_bias_value)) {
        clipft_fail(&error, "out of memory, or a matrix product failed in torch");
        goto done;
    }
    loss_gradients_finish(&grad);
    if (loss_result(clipft_torch.aoti_torch_dtype_float32(), scale_value, &d_scale, &error) &&
        loss_result(clipft_torch.aoti_torch_dtype_float32(), d_bias_value, &d_bias, &error)) {
        stack[0] = clipft_box(&grad.image);
        stack[1] = clipft_box(&grad.text);
        stack[2] = clipft_box(&d_scale);
        stack[3] = clipft_box(&d_bias);
    }
done:
    loss_gradients_free(&grad);
    clipft_release(&d_scale);
    clipft_release(&d_bias);
    clipft_release(&upstream);
    clipft_release(&tiles);
    clipft_release(&bias);
    loss_inputs_free(&in);
    clipft_throw(&error, __FILE__, __LINE__);
}
