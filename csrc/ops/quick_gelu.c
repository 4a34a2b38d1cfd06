/* quick_gelu: x sigmoid(1.702 x) and its gradient, one pass each over a contiguous tensor. */
#include "lora_inputs.h"
#include "ops.h"

void clipft_op_quick_gelu(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quick_gelu"};
    clipft_tensor input = {0}, out = {0};
    clipft_view x = {0}, y = {0};
    if (!gelu_take(stack[0], "input", &input, &x, &error) || !clipft_check_cpu(&input, &error) ||
        !gelu_make_result(&input, &out, &y, &error))
        goto done;
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
    if (!gelu_take_gradient(stack, &grad, &dy, &input, &x, &error) || !clipft_check_cpu(&input, &error) ||
        !gelu_make_result(&input, &out, &dx, &error))
        goto done;
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
