/* quick_gelu: x sigmoid(1.702 x) and its gradient, one pass each over a contiguous tensor. */
#include "lora_inputs.h"

static void run_quick_gelu(const quick_gelu_args *args, quick_gelu_results *results, clipft_error *error)
{
    clipft_tensor input = {0}, out = {0};
    clipft_view x = {0}, y = {0};
    if (!gelu_take(args->input, "input", &input, &x, error) || !clipft_check_cpu(&input, error) ||
        !gelu_make_result(&input, &out, &y, error))
        goto done;
    if (clipft_quick_gelu(&clipft_torch_host, &x, &y))
        results->result = clipft_box(&out);
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "torch's threads failed");
done:
    clipft_release(&out);
    clipft_release(&input);
}
CLIPFT_CPU_ENTRY(quick_gelu)

static void run_quick_gelu_backward(const quick_gelu_backward_args *args, quick_gelu_backward_results *results, clipft_error *error)
{
    clipft_tensor grad = {0}, input = {0}, out = {0};
    clipft_view dy = {0}, x = {0}, dx = {0};
    if (!gelu_take_gradient(args, &grad, &dy, &input, &x, error) || !clipft_check_cpu(&input, error) ||
        !gelu_make_result(&input, &out, &dx, error))
        goto done;
    if (clipft_quick_gelu_backward(&clipft_torch_host, &dy, &x, &dx))
        results->result = clipft_box(&out);
    else
        clipft_fail(error, CLIPFT_RUNTIME_ERROR, "torch's threads failed");
done:
    clipft_release(&out);
    clipft_release(&grad);
    clipft_release(&input);
}
CLIPFT_CPU_ENTRY(quick_gelu_backward)
