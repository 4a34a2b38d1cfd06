/* quick_gelu: x sigmoid(1.702 x) and its gradient, one pass each over a contiguous tensor. */
#include "../kernels/lora.h"
#include "../tensor.h"
#include "ops.h"

static bool take(StableIValue slot, const char *name, clipft_tensor *t, clipft_view *view, clipft_error *error)
{
    char shape[96];
    if (!clipft_unbox(slot, name, t, error)) return false;
    if (!clipft_is_float(t))
        return clipft_fail(error, "%s must be float32, bfloat16 or float16, got %s", name, clipft_dtype_name(t->dtype));
    if (!clipft_check_cpu(t, error)) return false;
    if (t->ndim < 1 || t->ndim > CLIPFT_MAX_DIM)
        return clipft_fail(error, "%s must have 1 to %d dimensions, got shape %s", name, CLIPFT_MAX_DIM,
                           clipft_shape_text(t, shape, sizeof shape));
    return clipft_tensor_view(t, view) || clipft_fail(error, "%s must be contiguous", name);
}

static bool make_result(const clipft_tensor *like, clipft_tensor *out, clipft_view *view, clipft_error *error)
{
    return clipft_empty(like->dtype, like->ndim, like->size, out, error) &&
           (clipft_tensor_view(out, view) || clipft_fail(error, "the result has no memory"));
}

void clipft_op_quick_gelu(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quick_gelu"};
    clipft_tensor input = {0}, out = {0};
    clipft_view x = {0}, y = {0};
    if (!take(stack[0], "input", &input, &x, &error) || !make_result(&input, &out, &y, &error)) goto done;
    if (clipft_quick_gelu(&clipft_torch_host, &x, &y))
        stack[0] = clipft_box(&out);
    else
        clipft_fail(&error, "torch's threads failed");
done:
    clipft_release(&out);
    clipft_release(&input);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_op_quick_gelu_backward(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quick_gelu_backward"};
    clipft_tensor grad = {0}, input = {0}, out = {0};
    clipft_view dy = {0}, x = {0}, dx = {0};
    bool ok = take(stack[0], "grad", &grad, &dy, &error);
    ok &= take(stack[1], "input", &input, &x, &error);
    if (ok && (dy.rows != x.rows || dy.cols != x.cols || dy.kind != x.kind)) ok = clipft_fail(&error, "grad must be like input");
    if (!ok || !make_result(&input, &out, &dx, &error)) goto done;
    if (clipft_quick_gelu_backward(&clipft_torch_host, &dy, &x, &dx))
        stack[0] = clipft_box(&out);
    else
        clipft_fail(&error, "torch's threads failed");
done:
    clipft_release(&out);
    clipft_release(&grad);
    clipft_release(&input);
    clipft_throw(&error, __FILE__, __LINE__);
}
