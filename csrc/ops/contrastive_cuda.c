/* torch.ops.clipft.contrastive_loss and its parts on CUDA: see kernels/loss/contrastive.c for the mathematics, cuda/contrastive.cu for the
 * kernels. */
#include "loss_cuda.h"

static bool take_targets(cuda_loss *loss, const target_slots *slots, clipft_tensor *labels, clipft_cuda_targets *targets, bool ok)
{
    const double smoothing = clipft_unbox_float(slots->label_smoothing);
    ok &= clipft_unbox(slots->labels, "labels", labels, loss->call.error);
    if (!ok || !loss_check_targets(labels, smoothing, &loss->in, loss->call.error)) return false;
    *targets = (clipft_cuda_targets){.cols = loss->cols, .smoothing = (float)smoothing};
    if (labels->size[0] == 0) return true;
    float *weight = cuda_work(&loss->call, clipft_dtype_float32(), loss->cols);
    targets->labels = (clipft_cuda_labels){labels->data, labels->stride[0]}, targets->weight = weight;
    clipft_cuda_class_weights_args args = {targets->labels, weight, loss->cols};
    return weight && cuda_launch_items(&loss->call, CLIPFT_CUDA_contrastive_class_weights, loss->cols, &args);
}

/* ---- forward ---- */

static bool make_lines(cuda_loss *loss, int64_t parts, int64_t lines, clipft_cuda_lines *out)
{
    out->part_max = cuda_work(&loss->call, clipft_dtype_float32(), parts);
    out->part_sum = cuda_work(&loss->call, clipft_dtype_float32(), parts);
    out->max = cuda_work(&loss->call, clipft_dtype_float32(), lines);
    return out->part_max && out->part_sum && out->max;
}

static bool forward_tile(cuda_loss *loss, const clipft_cuda_tile *tile, void *ctx)
{
    clipft_cuda_contrastive_tile_args args = *(clipft_cuda_contrastive_tile_args *)ctx;
    args.tile = *tile;
    args.first = tile->row0 == 0 && tile->col0 == 0;
    clipft_cuda_lines *row = &args.row, *col = &args.col;
    row->max += tile->row0, row->sum += tile->row0, row->lines = tile->rows, row->first = tile->col0 == 0;
    col->max += tile->col0, col->sum += tile->col0, col->lines = tile->cols, col->first = tile->row0 == 0;
    row->blocks = (int)cuda_blocks(tile->cols, CLIPFT_CUDA_BLOCK_COLS);
    col->blocks = (int)cuda_blocks(tile->rows, CLIPFT_CUDA_BLOCK_ROWS);
    clipft_cuda_contrastive_merge_args merge = {*row, *col};
    return cuda_loss_launch_tile(loss, CLIPFT_CUDA_contrastive_tile, tile, &args) &&
           cuda_launch(&loss->call, CLIPFT_CUDA_contrastive_merge,
                       cuda_blocks(tile->rows, CLIPFT_CUDA_MERGE_LINES) + cuda_blocks(tile->cols, CLIPFT_CUDA_MERGE_LINES), 1,
                       CLIPFT_CUDA_THREADS, &merge);
}

static void forward(const loss_slots *embeds, const target_slots *targets, contrastive_loss_results *results, clipft_error *error)
{
    cuda_loss loss = {.call.error = error};
    clipft_tensor value = {0}, row_lse = {0}, col_lse = {0}, target = {0}, tiles = {0}, labels = {0};
    clipft_cuda_contrastive_tile_args tile = {0};

    bool ok = cuda_loss_begin(&loss, CLIPFT_CUDA_FILE_contrastive, embeds);
    ok = take_targets(&loss, targets, &labels, &tile.targets, ok);
    if (!ok) goto done;
    const int64_t no_tiles[] = {0, loss.cols}, blocks = cuda_loss_tile_blocks(&loss);
    ok = clipft_empty_beside(&loss.in.image, clipft_dtype_float64(), 1, &loss.rows, &row_lse, error) &&
         clipft_empty_beside(&loss.in.image, clipft_dtype_float64(), 1, &loss.cols, &col_lse, error) &&
         clipft_empty_beside(&loss.in.image, clipft_dtype_float32(), 2, no_tiles, &tiles, error) &&
         make_lines(&loss, cuda_blocks(loss.tile_cols, CLIPFT_CUDA_BLOCK_COLS) * loss.tile_rows, loss.rows, &tile.row) &&
         make_lines(&loss, cuda_blocks(loss.tile_rows, CLIPFT_CUDA_BLOCK_ROWS) * loss.tile_cols, loss.cols, &tile.col);
    tile.scale = loss.in.scale.data, tile.row.sum = row_lse.data, tile.col.sum = col_lse.data;
    ok = ok && (tile.pair = cuda_work(&loss.call, clipft_dtype_float32(), loss.rows)) &&
         (tile.target = cuda_work(&loss.call, clipft_dtype_float64(), blocks)) && cuda_loss_walk(&loss, forward_tile, &tile);
    if (!ok) goto done;

    clipft_cuda_contrastive_lse_args lse = {
        tile.row.max, tile.col.max, tile.row.sum, tile.col.sum, tile.pair, tile.scale, loss.rows, loss.cols, loss.in.logits.row_offset};
    const clipft_cuda_sum_args target_sum = {.a = tile.target, .a_count = loss.rows > 0 ? blocks : 0, .factor = 1.0, .scale = tile.scale};
    clipft_cuda_sum_args value_sum = {.a = tile.row.sum,
                                      .a_count = loss.rows,
                                      .b = tile.col.sum,
                                      .b_count = loss.cols,
                                      .c_factor = -2.0,
                                      .factor = 1.0 / (2.0 * (double)loss.cols)};
    ok = cuda_launch_items(&loss.call, CLIPFT_CUDA_contrastive_lse, loss.rows + loss.cols, &lse) &&
         cuda_loss_sum(&loss, clipft_dtype_float64(), target_sum, &target);
    value_sum.c = target.data;
    if (ok && cuda_loss_sum(&loss, clipft_dtype_float32(), value_sum, &value))
        *results = (contrastive_loss_results){clipft_box(&value), clipft_box(&row_lse), clipft_box(&col_lse), clipft_box(&target),
                                              clipft_box(&tiles)};
done:
    clipft_release(&value);
    clipft_release(&row_lse);
    clipft_release(&col_lse);
    clipft_release(&target);
    clipft_release(&tiles);
    clipft_release(&labels);
    cuda_loss_end(&loss);
}

static void run_contrastive_loss(const contrastive_loss_args *args, contrastive_loss_results *results, clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, false, 0};
    const target_slots targets = {args->labels, args->label_smoothing};
    forward(&embeds, &targets, results, error);
}
CLIPFT_CUDA_ENTRY(contrastive_loss)

static void run_contrastive_loss_shard(const contrastive_loss_shard_args *args, contrastive_loss_shard_results *results,
                                       clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const target_slots targets = {args->labels, args->label_smoothing};
    contrastive_loss_results whole = {0};
    forward(&embeds, &targets, &whole, error);
    *results = (contrastive_loss_shard_results){whole.loss, whole.row_lse, whole.col_lse, whole.target, whole.tiles};
}
CLIPFT_CUDA_ENTRY(contrastive_loss_shard)

/* ---- backward ---- */

typedef struct backward_job {
    clipft_cuda_contrastive_grad_args args;
    cuda_gradients grad;
} backward_job;

static bool backward_tile(cuda_loss *loss, const clipft_cuda_tile *tile, void *ctx)
{
    backward_job *job = ctx;
    job->args.tile = *tile;
    return cuda_loss_launch_tile(loss, CLIPFT_CUDA_contrastive_grad, tile, &job->args) && cuda_gradients_add(loss, tile, &job->grad);
}

static void run_contrastive_loss_backward(const contrastive_loss_backward_args *args, contrastive_loss_backward_results *results,
                                          clipft_error *error)
{
    const loss_slots embeds = {args->image_embeds, args->text_embeds, args->logit_scale, true, clipft_unbox_int(args->row_offset)};
    const target_slots targets = {args->labels, args->label_smoothing};
    const bool needs_image = clipft_unbox_bool(args->needs_image), needs_text = clipft_unbox_bool(args->needs_text);
    cuda_loss loss = {.call.error = error};
    backward_job job = {0};
    clipft_tensor labels = {0}, upstream, row_lse, col_lse, tiles, d_scale = {0};

    bool ok = cuda_loss_begin(&loss, CLIPFT_CUDA_FILE_contrastive, &embeds);
    ok = take_targets(&loss, &targets, &labels, &job.args.targets, ok);
    ok &= clipft_unbox(args->grad, "grad", &upstream, error);
    ok &= clipft_unbox(args->row_lse, "row_lse", &row_lse, error);
    ok &= clipft_unbox(args->col_lse, "col_lse", &col_lse, error);
    ok &= clipft_unbox(args->tiles, "tiles", &tiles, error); /* empty here: a tile is made again in less time than memory gives it back */
    ok = ok && loss_check_scalar(&upstream, &loss.in.image, error) && clipft_check_beside(&row_lse, &loss.in.image, error) &&
         loss_check_lse(&row_lse, loss.rows, error) && clipft_check_beside(&col_lse, &loss.in.image, error) &&
         loss_check_lse(&col_lse, loss.cols, error) &&
         cuda_gradients_make(&loss, needs_image || !needs_text, needs_text, loss.in.image.dtype, &job.grad) &&
         clipft_empty_beside(&loss.in.image, clipft_dtype_float32(), 0, NULL, &d_scale, error);
    if (!ok) goto done;

    job.args.scale = loss.in.scale.data, job.args.row_lse = row_lse.data, job.args.col_lse = col_lse.data;
    job.args.out = job.grad.out, job.args.pair = job.grad.pair, job.args.unit = job.grad.unit;
    if (cuda_loss_walk(&loss, backward_tile, &job) &&
        cuda_gradients_finish(&loss, upstream.data, 1.0 / (2.0 * (double)loss.cols), &job.grad, d_scale.data))
        *results = (contrastive_loss_backward_results){clipft_box(&job.grad.image), clipft_box(&job.grad.text), clipft_box(&d_scale)};
done:
    cuda_gradients_free(&job.grad);
    clipft_release(&labels);
    clipft_release(&upstream);
    clipft_release(&row_lse);
    clipft_release(&col_lse);
    clipft_release(&tiles);
    clipft_release(&d_scale);
    cuda_loss_end(&loss);
}
CLIPFT_CUDA_ENTRY(contrastive_loss_backward)
