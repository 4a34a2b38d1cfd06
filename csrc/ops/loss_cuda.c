#include "loss_cuda.h"

/* Rows of a tile are a power of two in between, columns TILE_COLUMNS times as many, so that float32 products take at most TILE_CACHES times
 * the L2 cache. */
enum { SMALLEST_TILE = 128, LARGEST_TILE = 4096, TILE_CACHES = 4, TILE_COLUMNS = 2 };

/* float16 begins to lose bits at 6e-5: coefficients, 2 at most, are kept this much larger there. */
static const float float16_unit = 16384.0F;

/* ---- inputs and launches ---- */

static int64_t tile_rows(int32_t device)
{
    const int64_t items = TILE_CACHES * clipft_cuda_l2_bytes(device) / (int64_t)sizeof(float);
    int64_t rows = SMALLEST_TILE;
    while (rows < LARGEST_TILE && TILE_COLUMNS * (2 * rows) * (2 * rows) <= items) rows *= 2;
    return rows;
}

bool cuda_loss_begin(cuda_loss *loss, clipft_cuda_file file, const loss_slots *slots)
{
    if (!loss_inputs_unbox(&loss->in, slots, loss->call.error)) return false;
    const int32_t device = loss->in.image.index;
    if (!cuda_begin(&loss->call, file, &loss->in.image)) return false;
    loss->rows = loss->in.image.size[0], loss->cols = loss->in.text.size[0], loss->dim = loss->in.text.size[1];
    loss->tile_rows = tile_rows(device), loss->tile_cols = TILE_COLUMNS * loss->tile_rows;
    if (loss->tile_rows > loss->rows) loss->tile_rows = loss->rows;
    if (loss->tile_cols > loss->cols) loss->tile_cols = loss->cols;
    loss->stride = (loss->tile_cols + 7) / 8 * 8; /* rows aligned as tensor cores want them */
    loss->products = cuda_work(&loss->call, clipft_dtype_float32(), loss->tile_rows * loss->stride);
    return loss->products != NULL;
}

void cuda_loss_end(cuda_loss *loss)
{
    cuda_end(&loss->call);
    loss_inputs_free(&loss->in);
}

bool cuda_loss_launch_tile(cuda_loss *loss, clipft_cuda_kernel kernel, const clipft_cuda_tile *tile, void *args)
{
    return cuda_launch(&loss->call, kernel, cuda_blocks(tile->cols, CLIPFT_CUDA_BLOCK_COLS),
                       cuda_blocks(tile->rows, CLIPFT_CUDA_BLOCK_ROWS), CLIPFT_CUDA_THREADS, args);
}

int64_t cuda_loss_tile_blocks(const cuda_loss *loss)
{
    return cuda_blocks(loss->tile_cols, CLIPFT_CUDA_BLOCK_COLS) * cuda_blocks(loss->tile_rows, CLIPFT_CUDA_BLOCK_ROWS);
}

bool cuda_loss_launch_sum(cuda_loss *loss, clipft_cuda_sum_args sum)
{
    return cuda_launch(&loss->call, CLIPFT_CUDA_loss_sum, 1, 1, CLIPFT_CUDA_SUM_THREADS, &sum);
}

bool cuda_loss_sum(cuda_loss *loss, int32_t dtype, clipft_cuda_sum_args sum, clipft_tensor *out)
{
    if (!clipft_empty_beside(&loss->in.image, dtype, 0, NULL, out, loss->call.error)) return false;
    if (dtype == clipft_dtype_float32())
        sum.out32 = out->data;
    else
        sum.out64 = out->data;
    return cuda_loss_launch_sum(loss, sum);
}

/* ---- matrix products ---- */

/* Rows begin .. end - 1 of [N, D] embeddings. */
static clipft_view embeds_view(const clipft_tensor *t, int64_t begin, int64_t end)
{
    clipft_view view = {0};
    clipft_tensor_view(t, &view); /* two dimensions always are one */
    return clipft_view_rows(view, begin, end);
}

static clipft_view float_view(float *data, int64_t rows, int64_t cols, int64_t stride)
{
    return (clipft_view){data, rows, cols, stride, 1, CLIPFT_FLOAT32};
}

bool cuda_loss_walk(cuda_loss *loss, bool (*visit)(cuda_loss *, const clipft_cuda_tile *, void *), void *ctx)
{
    for (int64_t row0 = 0; row0 < loss->rows; row0 += loss->tile_rows)
        for (int64_t col0 = 0; col0 < loss->cols; col0 += loss->tile_cols) {
            const int64_t row1 = row0 + loss->tile_rows < loss->rows ? row0 + loss->tile_rows : loss->rows;
            const int64_t col1 = col0 + loss->tile_cols < loss->cols ? col0 + loss->tile_cols : loss->cols;
            const clipft_cuda_tile tile = {loss->products, (int)(row1 - row0),        (int)(col1 - col0), (int)loss->stride, row0,
                                           col0,           loss->in.logits.row_offset};
            if (!cuda_multiply(&loss->call, float_view(loss->products, tile.rows, tile.cols, loss->stride), NULL, false,
                               embeds_view(&loss->in.image, row0, row1), clipft_view_transposed(embeds_view(&loss->in.text, col0, col1))) ||
                !visit(loss, &tile, ctx))
                return false;
        }
    return true;
}

/* ---- gradients ---- */

/* One side's result, and where its sums go: the same place for float32. */
static bool make_side(cuda_loss *loss, const clipft_tensor *like, bool needed, int32_t dtype, clipft_tensor *out, float **sum)
{
    const int64_t none[] = {0, 0};
    if (!clipft_empty_beside(&loss->in.image, dtype, 2, needed ? like->size : none, out, loss->call.error)) return false;
    if (needed)
        *sum = dtype == clipft_dtype_float32() && like->size[0] > 0
                   ? out->data
                   : cuda_work(&loss->call, clipft_dtype_float32(), like->size[0] * loss->dim);
    return !needed || *sum;
}

bool cuda_gradients_make(cuda_loss *loss, bool needs_image, bool needs_text, int32_t dtype, cuda_gradients *grad)
{
    const int kind = (int)embeds_view(&loss->in.image, 0, 0).kind;
    const int64_t tallest = loss->tile_cols > loss->tile_rows ? loss->tile_cols : loss->tile_rows;
    grad->unit = kind == CLIPFT_CUDA_FLOAT16 ? float16_unit : 1.0F;
    grad->out.kind = kind;
    if (!make_side(loss, &loss->in.image, needs_image, dtype, &grad->image, &grad->image_sum) ||
        !make_side(loss, &loss->in.text, needs_text, dtype, &grad->text, &grad->text_sum))
        return false;
    if (!needs_image && !needs_text) return true;
    grad->pair = cuda_work(&loss->call, clipft_dtype_float32(), loss->rows);
    if (kind == CLIPFT_CUDA_FLOAT32) {
        grad->out.data32 = loss->products;
        return grad->pair != NULL;
    }
    grad->out.data16 = cuda_work(&loss->call, loss->in.image.dtype, loss->tile_rows * loss->stride);
    grad->part = cuda_work(&loss->call, clipft_dtype_float32(), tallest * loss->dim);
    return grad->pair && grad->out.data16 && grad->part;
}

/* rows of sum = or += coefficients other. */
static bool add_side(cuda_loss *loss, cuda_gradients *grad, float *sum, clipft_view coefficients, clipft_view other, bool first)
{
    const bool apart = !first && coefficients.kind != CLIPFT_FLOAT32; /* torch has no sum of mixed types */
    float *out = apart ? grad->part : sum;
    const clipft_view c = float_view(out, coefficients.rows, loss->dim, loss->dim);
    if (!cuda_multiply(&loss->call, c, NULL, !first && !apart, coefficients, other)) return false;
    clipft_cuda_gradient_add_args args = {sum, out, coefficients.rows * loss->dim};
    const int64_t blocks = cuda_blocks(args.count, 4 * (int64_t)CLIPFT_CUDA_THREADS);
    return !apart || cuda_launch(&loss->call, CLIPFT_CUDA_gradient_add, blocks, 1, CLIPFT_CUDA_THREADS, &args);
}

bool cuda_gradients_add(cuda_loss *loss, const clipft_cuda_tile *tile, cuda_gradients *grad)
{
    void *data = grad->out.kind == CLIPFT_CUDA_FLOAT32 ? (void *)grad->out.data32 : (void *)grad->out.data16;
    const clipft_view coefficients = {data, tile->rows, tile->cols, tile->stride, 1, (clipft_float_kind)grad->out.kind};
    const int64_t row0 = tile->row0, col0 = tile->col0, row1 = row0 + tile->rows, col1 = col0 + tile->cols;
    return (!grad->image_sum ||
            add_side(loss, grad, grad->image_sum + row0 * loss->dim, coefficients, embeds_view(&loss->in.text, col0, col1), col0 == 0)) &&
           (!grad->text_sum || add_side(loss, grad, grad->text_sum + col0 * loss->dim, clipft_view_transposed(coefficients),
                                        embeds_view(&loss->in.image, row0, row1), row0 == 0));
}

static clipft_cuda_target target_of(const clipft_tensor *t)
{
    clipft_view view = {0};
    clipft_tensor_view(t, &view); /* two dimensions always are one */
    return cuda_target(&view);
}

bool cuda_gradients_finish(cuda_loss *loss, const float *upstream, double factor, cuda_gradients *grad, float *d_scale)
{
    const loss_inputs *in = &loss->in;
    const int64_t offset = in->logits.row_offset;
    struct side {
        const float *sum;
        const clipft_tensor *value, *other, *out;
        int64_t pair_first, other_first;
    } sides[] = {{grad->image_sum, &in->image, &in->text, &grad->image, 0, offset},
                 {grad->text_sum, &in->text, &in->image, &grad->text, offset, 0}};
    const int64_t dots = grad->image_sum ? loss->rows : loss->cols;
    double *dot = cuda_work(&loss->call, clipft_dtype_float64(), dots);
    if (!dot) return false;
    for (int k = 0; k < 2; ++k) {
        const struct side *side = &sides[k];
        if (!side->sum) continue;
        const int64_t rows = side->value->size[0];
        const clipft_view value = embeds_view(side->value, 0, rows), other = embeds_view(side->other, 0, side->other->size[0]);
        clipft_cuda_gradient_finish_args args = {
            .sum = loss->rows > 0 ? side->sum : NULL, /* of no image there is none */
            .value = cuda_matrix(&value),
            .other = cuda_matrix(&other),
            .pair = grad->pair,
            .rows = rows,
            .dim = loss->dim,
            .pairs = loss->rows,
            .pair_first = side->pair_first,
            .other_first = side->other_first,
            .scale = in->scale.data,
            .grad = upstream,
            .factor = factor,
            .unit = grad->unit,
            .out = target_of(side->out),
            .dot = k == 0 || !grad->image_sum ? dot : NULL,
        };
        if (!cuda_launch(&loss->call, CLIPFT_CUDA_gradient_finish, cuda_blocks(rows, CLIPFT_CUDA_WARPS), 1, CLIPFT_CUDA_THREADS, &args))
            return false;
    }
    return cuda_loss_launch_sum(loss,
                                (clipft_cuda_sum_args){.a = dot, .a_count = dots, .factor = factor, .grad = upstream, .out32 = d_scale});
}

void cuda_gradients_free(cuda_gradients *grad)
{
    clipft_release(&grad->image);
    clipft_release(&grad->text);
}
