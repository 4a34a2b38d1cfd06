/* torch.ops.clipft.sigmoid_loss and its parts on CUDA: see kernels/loss/sigmoid.c for the mathematics, cuda/sigmoid.cu for the kernels. */
#include "loss_cuda.h"

typedef struct term_inputs {
    clipft_tensor bias, labels;
} term_inputs;

/* The bias, the labels, and where the blocks of a tile leave their sums. */
static bool begin(cuda_loss *loss, clipft_slot_Tensor bias, clipft_slot_Tensor labels, term_inputs *t, clipft_cuda_sigmoid_args *args,
                  bool ok)
{
    ok &= clipft_unbox(bias, "logit_bias", &t->bias, loss->call.error);
    ok &= clipft_unbox(labels, "labels", &t->labels, loss->call.error);
    if (!ok || !loss_check_scalar(&t->bias, &loss->in.image, loss->call.error) ||
        !loss_check_labels(&t->labels, &loss->in, loss->call.error))
        return false;
    args->scale = loss->in.scale.data, args->bias = t->bias.data;
    if (t->labels.size[0] > 0) args->labels = (clipft_cuda_labels){t->labels.data, t->labels.stride[0]};
    args->sum = cuda_work(&loss->call, clipft_dtype_float64(), cuda_loss_tile_blocks(loss));
    return args->sum;
}

static clipft_cuda_sum_args sum_of_blocks(const cuda_loss *loss, const clipft_cuda_sigmoid_args *args)
{
    const int64_t count = loss->rows > 0 ? cuda_loss_tile_blocks(loss) : 0;
    return (clipft_cuda_sum_args){.a = args->sum, .a_count = count, .factor = 1.0 / (double)loss->cols};
}

static void set_tile(clipft_cuda_sigmoid_args *args, const clipft_cuda_tile *tile)
{
    args->tile = *tile;
    args->first = tile->row0 == 0 && tile->col0 == 0;
}

static bool forward_tile(cuda_loss *loss, const clipft_cuda_tile *tile, void *ctx)
{
    set_tile(ctx, tile);
    return cuda_loss_launch_tile(loss, CLIPFT_CUDA_sigmoid_tile, tile, ctx);
}

static void end(cuda_loss *loss, term_inputs *t)
{
    clipft_release(&t->bias);
    clipft_release(&t->labels);
    cuda_loss_end(loss);
}

static void forward(const loss_slots *embeds, clipft_slot_Tensor bias, clipft_slot_Tensor labels, sigmoid_loss_results *results,
                    clipft_error *error)
{
    cuda_loss loss = {.call.error = error};
    term_inputs t = {0};
    clipft_tensor value = {0}, tiles = {0};
    clipft_cuda_sigmoid_args args = {.unit = 1.0F};

    bool ok = cuda_loss_begin(&loss, CLIPFT_CUDA_FILE_sigmoid, embeds);
    ok = begin(&loss, bias, labels, &t, &args, ok);
    const int64_t no_tiles[] = {0, loss.cols};
    ok = ok && clipft_empty_beside(&loss.in.image, clipft_dtype_float32(), 2, no_tiles, &tiles, error) &&
         cuda_loss_walk(&loss, forward_tile, &args);
    if (ok && cuda_loss_sum(&loss, clipft_dtype_float32(), sum_of_blocks(&loss, &args), &value))
        *results = (sigmoid_loss_results){clipft_box(&value), clipft_box(&tiles)};
    clipft_release(&value);
    clipft_release(&tiles);
    end(&loss, &t);
}

static void run_sigmoid_loss(const sigmoid_loss_args *args, sigmoid_loss_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, false, 0};
    forward(&embeds, args->logit_bias, args->labels, results, error);
}
CLIPFT_CUDA_ENTRY(sigmoid_loss)

static void run_sigmoid_loss_shard(const sigmoid_loss_shard_args *args, sigmoid_loss_shard_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    sigmoid_loss_results whole = {0};
    forward(&embeds, args->logit_bias, args->labels, &whole, error);
    *results = (sigmoid_loss_shard_results){whole.loss, whole.tiles};
}
CLIPFT_CUDA_ENTRY(sigmoid_loss_shard)

typedef struct backward_job {
    clipft_cuda_sigmoid_args args;
    cuda_gradients grad;
} backward_job;

static bool backward_tile(cuda_loss *loss, const clipft_cuda_tile *tile, void *ctx)
{
    backward_job *job = ctx;
    set_tile(&job->args, tile);
    return cuda_loss_launch_tile(loss, CLIPFT_CUDA_sigmoid_grad, tile, &job->args) && cuda_gradients_add(loss, tile, &job->grad);
}

static void run_sigmoid_loss_backward(const sigmoid_loss_backward_args *args, sigmoid_loss_backward_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const bool needs_image = clipft_unbox_bool(args->needs_image), needs_text = clipft_unbox_bool(args->needs_text);
    cuda_loss loss = {.call.error = error};
    backward_job job = {0};
    term_inputs t = {0};
    clipft_tensor upstream, tiles, d_scale = {0}, d_bias = {0};

    bool ok = cuda_loss_begin(&loss, CLIPFT_CUDA_FILE_sigmoid, &embeds);
    ok = begin(&loss, args->logit_bias, args->labels, &t, &job.args, ok);
    ok &= clipft_unbox(args->grad, "grad", &upstream, error);
    ok &= clipft_unbox(args->tiles, "tiles", &tiles, error);
    ok = ok && loss_check_scalar(&upstream, &loss.in.image, error) && cuda_gradients_make(&loss, needs_image, needs_text, &job.grad);
    if (!ok) goto done;

    job.args.out = job.grad.out, job.args.pair = job.grad.pair, job.args.unit = job.grad.unit;
    clipft_cuda_sum_args sum = sum_of_blocks(&loss, &job.args);
    sum.grad = upstream.data;
    if (cuda_loss_walk(&loss, backward_tile, &job) &&
        cuda_gradients_finish(&loss, &upstream, 1.0 / (double)loss.cols, &job.grad, &d_scale) &&
        cuda_loss_sum(&loss, clipft_dtype_float32(), sum, &d_bias))
        *results = (sigmoid_loss_backward_results){clipft_box(&job.grad.image), clipft_box(&job.grad.text), clipft_box(&d_scale),
                                                   clipft_box(&d_bias)};
done:
    cuda_gradients_free(&job.grad);
    clipft_release(&d_scale);
    clipft_release(&d_bias);
    clipft_release(&upstream);
    clipft_release(&tiles);
    end(&loss, &t);
}
CLIPFT_CUDA_ENTRY(sigmoid_loss_backward)
