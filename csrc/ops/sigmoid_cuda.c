/* torch.ops.clipft.sigmoid_loss and its parts on CUDA: see kernels/loss/sigmoid.c for the mathematics, cuda/sigmoid.cu for the kernels. */
#include "loss_cuda.h"

typedef struct sigmoid_job {
    clipft_tensor bias, labels, value, scalars;
    clipft_cuda_sigmoid_args args;
    sigmoid_needs needs;
    cuda_gradients grad;
} sigmoid_job;

/* The bias, the labels, and room for sums and gradients. */
static bool begin(cuda_loss *loss, clipft_slot_Tensor bias, clipft_slot_Tensor labels, sigmoid_job *job, bool ok)
{
    const clipft_tensor *image = &loss->in.image;
    const int64_t scalars = job->needs.any ? 2 : 0;
    clipft_error *error = loss->call.error;
    ok &= clipft_unbox(bias, "logit_bias", &job->bias, error);
    ok &= clipft_unbox(labels, "labels", &job->labels, error);
    if (!ok || !loss_check_scalar(&job->bias, image, error) || !loss_check_labels(&job->labels, &loss->in, error) ||
        !clipft_empty_beside(image, clipft_dtype_float32(), 1, &scalars, &job->scalars, error) ||
        !cuda_gradients_make(loss, job->needs.image, job->needs.text, clipft_dtype_float32(), &job->grad))
        return false;
    clipft_cuda_sigmoid_args *args = &job->args;
    const int64_t blocks = cuda_loss_tile_blocks(loss);
    args->scale = loss->in.scale.data, args->bias = job->bias.data;
    if (job->labels.size[0] > 0) args->labels = (clipft_cuda_labels){job->labels.data, job->labels.stride[0]};
    args->out = job->grad.out, args->pair = job->grad.pair, args->unit = job->grad.unit;
    args->loss = cuda_work(&loss->call, clipft_dtype_float64(), blocks);
    args->coefficient = args->loss ? cuda_work(&loss->call, clipft_dtype_float64(), blocks) : NULL;
    return args->coefficient;
}

static bool do_tile(cuda_loss *loss, const clipft_cuda_tile *tile, void *ctx)
{
    sigmoid_job *job = ctx;
    job->args.tile = *tile;
    job->args.first = tile->row0 == 0 && tile->col0 == 0;
    if (!job->needs.any) return cuda_loss_launch_tile(loss, CLIPFT_CUDA_sigmoid_tile, tile, &job->args);
    return cuda_loss_launch_tile(loss, CLIPFT_CUDA_sigmoid_grad, tile, &job->args) && cuda_gradients_add(loss, tile, &job->grad);
}

static bool finish(cuda_loss *loss, sigmoid_job *job)
{
    const double factor = 1.0 / (double)loss->cols;
    const int64_t count = loss->rows > 0 ? cuda_loss_tile_blocks(loss) : 0;
    const clipft_cuda_sum_args value = {.a = job->args.loss, .a_count = count, .factor = factor};
    if (!cuda_loss_sum(loss, clipft_dtype_float32(), value, &job->value)) return false;
    if (!job->needs.any) return true;
    float *scalars = job->scalars.data;
    const clipft_cuda_sum_args d_bias = {.a = job->args.coefficient, .a_count = count, .factor = factor, .out32 = scalars + 1};
    return cuda_loss_launch_sum(loss, d_bias) && cuda_gradients_finish(loss, NULL, factor, &job->grad, scalars);
}

static void run(const loss_slots *embeds, const sigmoid_needs *needs, clipft_slot_Tensor bias, clipft_slot_Tensor labels,
                sigmoid_loss_results *results, clipft_error *error)
{
    cuda_loss loss = {.call.error = error};
    sigmoid_job job = {.needs = *needs};

    const bool ok = cuda_loss_begin(&loss, CLIPFT_CUDA_FILE_sigmoid, embeds);
    if (begin(&loss, bias, labels, &job, ok) && cuda_loss_walk(&loss, do_tile, &job) && finish(&loss, &job))
        *results = (sigmoid_loss_results){clipft_box(&job.value), clipft_box(&job.grad.image), clipft_box(&job.grad.text),
                                          clipft_box(&job.scalars)};
    cuda_gradients_free(&job.grad);
    clipft_release(&job.bias);
    clipft_release(&job.labels);
    clipft_release(&job.value);
    clipft_release(&job.scalars);
    cuda_loss_end(&loss);
}

static void run_sigmoid_loss(const sigmoid_loss_args *args, sigmoid_loss_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, false, 0};
    const sigmoid_needs needs = sigmoid_needs_of(args->needs_image, args->needs_text, args->needs_scalars);
    run(&embeds, &needs, args->logit_bias, args->labels, results, error);
}
CLIPFT_CUDA_ENTRY(sigmoid_loss)

static void run_sigmoid_loss_shard(const sigmoid_loss_shard_args *args, sigmoid_loss_shard_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const sigmoid_needs needs = sigmoid_needs_of(args->needs_image, args->needs_text, args->needs_scalars);
    sigmoid_loss_results whole = {0};
    run(&embeds, &needs, args->logit_bias, args->labels, &whole, error);
    *results = (sigmoid_loss_shard_results){whole.loss, whole.image, whole.text, whole.scalars};
}
CLIPFT_CUDA_ENTRY(sigmoid_loss_shard)
