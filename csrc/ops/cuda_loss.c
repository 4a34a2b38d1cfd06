#include "cuda_loss.h"

/* Sides of a tile are powers of two in between; a tile of twice as many columns as rows. */
enum { SMALLEST_TILE = 128, LARGEST_TILE = 4096 };

/* float16 begins to lose bits at 6e-5: coefficients, 2 at most, are kept this much larger there. */
static const float float16_unit = 16384.0F;

static int32_t float32(void) { return clipft_torch.aoti_torch_dtype_float32(); }

static int float_kind(const clipft_tensor *t)
{
    return t->dtype == float32()                                  ? CLIPFT_CUDA_FLOAT32
           : t->dtype == clipft_torch.aoti_torch_dtype_bfloat16() ? CLIPFT_CUDA_BFLOAT16
                                                                  : CLIPFT_CUDA_FLOAT16;
}

/* ---- inputs, work space, launches ---- */

static int64_t tile_side(int32_t device)
{
    const int64_t items = clipft_cuda_l2_bytes(device) / (int64_t)sizeof(float);
    int64_t side = SMALLEST_TILE;
    while (side < LARGEST_TILE && 2 * (2 * side) * (2 * side) <= items) side *= 2;
    return side;
}

bool cuda_loss_begin(cuda_loss *loss, const StableIValue *stack, bool shard, int64_t row_offset)
{
    if (!loss_inputs_unbox(&loss->in, stack, shard, row_offset, loss->error)) return false;
    const int32_t device = loss->in.image.index;
    const char *problem = clipft_cuda_problem(device);
    if (problem) return clipft_fail(loss->error, "the CUDA kernels cannot run: %s", problem);
    if (clipft_torch_cuda.aoti_torch_get_current_cuda_stream(device, &loss->stream))
        return clipft_fail(loss->error, "torch has no current stream on cuda:%d", device);
    loss->rows = loss->in.image.size[0], loss->cols = loss->in.text.size[0], loss->dim = loss->in.text.size[1];
    loss->tile_rows = tile_side(device), loss->tile_cols = 2 * loss->tile_rows;
    if (loss->tile_rows > loss->rows) loss->tile_rows = loss->rows;
    if (loss->tile_cols > loss->cols) loss->tile_cols = loss->cols;
    loss->stride = (loss->tile_cols + 7) / 8 * 8; /* rows aligned as tensor cores want them */
    loss->products = cuda_loss_work(loss, float32(), loss->tile_rows * loss->stride);
    return loss->products != NULL;
}

void cuda_loss_end(cuda_loss *loss)
{
    for (int k = 0; k < loss->works; ++k) clipft_release(&loss->work[k]);
    loss_inputs_free(&loss->in);
}

void *cuda_loss_work(cuda_loss *loss, int32_t dtype, int64_t count)
{
    const int64_t size = count > 0 ? count : 1; /* torch gives nothing no address */
    if (loss->works == CUDA_LOSS_WORK) {
        clipft_fail(loss->error, "more work space than CUDA_LOSS_WORK: a bug in clipft");
        return NULL;
    }
    clipft_tensor *t = &loss->work[loss->works++];
    return clipft_empty_beside(&loss->in.image, dtype, 1, &size, t, loss->error) ? t->data : NULL;
}

bool cuda_loss_launch(cuda_loss *loss, clipft_cuda_kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads, void *args)
{
    const char *problem = clipft_cuda_launch(loss->in.image.index, loss->stream, kernel, blocks_x, blocks_y, threads, args);
    return !problem || clipft_fail(loss->error, "a CUDA kernel did not start: %s", problem);
}

bool cuda_loss_launch_items(cuda_loss *loss, clipft_cuda_kernel kernel, int64_t count, void *args)
{
    return cuda_loss_launch(loss, kernel, cuda_blocks(count, CLIPFT_CUDA_THREADS), 1, CLIPFT_CUDA_THREADS, args);
}

bool cuda_loss_launch_tile(cuda_loss *loss, clipft_cuda_kernel kernel, const clipft_cuda_tile *tile, void *args)
{
    return cuda_loss_launch(loss, kernel, cuda_blocks(tile->cols, CLIPFT_CUDA_BLOCK_COLS), cuda_blocks(tile->rows, CLIPFT_CUDA_BLOCK_ROWS),
                            CLIPFT_CUDA_THREADS, args);
}

int64_t cuda_loss_tile_blocks(const cuda_loss *loss)
{
    return cuda_blocks(loss->tile_cols, CLIPFT_CUDA_BLOCK_COLS) * cuda_blocks(loss->tile_rows, CLIPFT_CUDA_BLOCK_ROWS);
}

bool cuda_loss_sum(cuda_loss *loss, int32_t dtype, clipft_cuda_sum_args sum, clipft_tensor *out)
{
    if (!clipft_empty_beside(&loss->in.image, dtype, 0, NULL, out, loss->error)) return false;
    if (dtype == float32())
        sum.out32 = out->data;
    else
        sum.out64 = out->data;
    return cuda_loss_launch(loss, CLIPFT_CUDA_loss_sum, 1, 1, CLIPFT_CUDA_SUM_THREADS, &sum);
}

/* ---- matrix products ---- */

static clipft_float_kind view_kind(int kind)
{
    return kind == CLIPFT_CUDA_FLOAT32 ? CLIPFT_FLOAT32 : kind == CLIPFT_CUDA_BFLOAT16 ? CLIPFT_BFLOAT16 : CLIPFT_FLOAT16;
}

/* Rows begin .. end - 1 of [N, D] embeddings. */
static clipft_view embeds_view(const clipft_tensor *t, int64_t begin, int64_t end)
{
    const size_t item = t->dtype == float32() ? sizeof(float) : sizeof(uint16_t);
    return (clipft_view){(char *)t->data + (ptrdiff_t)item * (ptrdiff_t)(begin * t->stride[0]),
                         end - begin,
                         t->size[1],
                         t->stride[0],
                         t->stride[1],
                         view_kind(float_kind(t))};
}

static clipft_view float_view(float *data, int64_t rows, int64_t cols, int64_t stride)
{
    return (clipft_view){data, rows, cols, stride, 1, CLIPFT_FLOAT32};
}

/* c = a b, or c += a b for float32 factors. c is float32, and so is the arithmetic of sums. */
static bool multiply(cuda_loss *loss, clipft_view c, clipft_view a, clipft_view b, bool accumulate)
{
    const int32_t device = loss->in.image.device, index = loss->in.image.index;
    AtenTensorHandle out = clipft_tensor_wrap(&c, device, index), left = clipft_tensor_wrap(&a, device, index),
                     right = clipft_tensor_wrap(&b, device, index);
    bool ok = out && left && right;
    if (ok && a.kind == CLIPFT_FLOAT32)
        ok = !clipft_torch_cuda.aoti_torch_cuda_addmm_out(out, out, left, right, accumulate ? 1.0 : 0.0, 1.0);
    else if (ok)
        ok = !clipft_torch_cuda.aoti_torch_cuda_mm_dtype_out(out, left, right, float32());
    if (out) clipft_torch.aoti_torch_delete_tensor_object(out);
    if (left) clipft_torch.aoti_torch_delete_tensor_object(left);
    if (right) clipft_torch.aoti_torch_delete_tensor_object(right);
    return ok ||
           clipft_fail(loss->error, "a matrix product failed in torch: %s", clipft_torch_cuda.torch_exception_get_what_without_backtrace());
}

bool cuda_loss_walk(cuda_loss *loss, bool (*visit)(cuda_loss *, const clipft_cuda_tile *, void *), void *ctx)
{
    for (int64_t row0 = 0; row0 < loss->rows; row0 += loss->tile_rows)
        for (int64_t col0 = 0; col0 < loss->cols; col0 += loss->tile_cols) {
            const int64_t row1 = row0 + loss->tile_rows < loss->rows ? row0 + loss->tile_rows : loss->rows;
            const int64_t col1 = col0 + loss->tile_cols < loss->cols ? col0 + loss->tile_cols : loss->cols;
            const clipft_cuda_tile tile = {loss->products, (int)(row1 - row0),        (int)(col1 - col0), (int)loss->stride, row0,
                                           col0,           loss->in.logits.row_offset};
            if (!multiply(loss, float_view(loss->products, tile.rows, tile.cols, loss->stride), embeds_view(&loss->in.image, row0, row1),
                          clipft_view_transposed(embeds_view(&loss->in.text, col0, col1)), false) ||
                !visit(loss, &tile, ctx))
                return false;
        }
    return true;
}

/* ---- gradients ---- */

/* One side's result, and where its sums go: the same place for float32. */
static bool make_side(cuda_loss *loss, const clipft_tensor *like, bool needed, clipft_tensor *out, float **sum)
{
    const int64_t none[] = {0, 0};
    if (!clipft_empty_beside(&loss->in.image, like->dtype, 2, needed ? like->size : none, out, loss->error)) return false;
    if (needed)
        *sum = like->dtype == float32() && like->size[0] > 0 ? out->data : cuda_loss_work(loss, float32(), like->size[0] * loss->dim);
    return !needed || *sum;
}

bool cuda_gradients_make(cuda_loss *loss, bool needs_image, bool needs_text, cuda_gradients *grad)
{
    const int kind = float_kind(&loss->in.image);
    const int64_t tallest = loss->tile_cols > loss->tile_rows ? loss->tile_cols : loss->tile_rows;
    grad->unit = kind == CLIPFT_CUDA_FLOAT16 ? float16_unit : 1.0F;
    grad->out.kind = kind;
    if (!make_side(loss, &loss->in.image, needs_image || !needs_text, &grad->image, &grad->image_sum) ||
        !make_side(loss, &loss->in.text, needs_text, &grad->text, &grad->text_sum))
        return false;
    grad->pair = cuda_loss_work(loss, float32(), loss->rows);
    if (kind == CLIPFT_CUDA_FLOAT32) {
        grad->out.data32 = loss->products;
        return grad->pair != NULL;
    }
    grad->out.data16 = cuda_loss_work(loss, loss->in.image.dtype, loss->tile_rows * loss->stride);
    grad->part = cuda_loss_work(loss, float32(), tallest * loss->dim);
    return grad->pair && grad->out.data16 && grad->part;
}

/* rows of sum = or += coefficients other. */
static bool add_side(cuda_loss *loss, cuda_gradients *grad, float *sum, clipft_view coefficients, clipft_view other, bool first)
{
    const bool apart = !first && coefficients.kind != CLIPFT_FLOAT32; /* torch has no sum of mixed types */
    float *out = apart ? grad->part : sum;
    if (!multiply(loss, float_view(out, coefficients.rows, loss->dim, loss->dim), coefficients, other, !first)) return false;
    clipft_cuda_gradient_add_args args = {sum, out, coefficients.rows * loss->dim};
    const int64_t blocks = cuda_blocks(args.count, 4 * (int64_t)CLIPFT_CUDA_THREADS);
    return !apart || cuda_loss_launch(loss, CLIPFT_CUDA_gradient_add, blocks, 1, CLIPFT_CUDA_THREADS, &args);
}

bool cuda_gradients_add(cuda_loss *loss, const clipft_cuda_tile *tile, cuda_gradients *grad)
{
    void *data = grad->out.kind == CLIPFT_CUDA_FLOAT32 ? (void *)grad->out.data32 : (void *)grad->out.data16;
    const clipft_view coefficients = {data, tile->rows, tile->cols, tile->stride, 1, view_kind(grad->out.kind)};
    const int64_t row0 = tile->row0, col0 = tile->col0, row1 = row0 + tile->rows, col1 = col0 + tile->cols;
    return (!grad->image_sum ||
            add_side(loss, grad, grad->image_sum + row0 * loss->dim, coefficients, embeds_view(&loss->in.text, col0, col1), col0 == 0)) &&
           (!grad->text_sum || add_side(loss, grad, grad->text_sum + col0 * loss->dim, clipft_view_transposed(coefficients),
                                        embeds_view(&loss->in.image, row0, row1), row0 == 0));
}

static clipft_cuda_matrix device_matrix(const clipft_tensor *t)
{
    const int kind = float_kind(t);
    return (clipft_cuda_matrix){kind == CLIPFT_CUDA_FLOAT32 ? t->data : NULL, kind == CLIPFT_CUDA_FLOAT32 ? NULL : t->data, t->stride[0],
                                t->stride[1], kind};
}

bool cuda_gradients_finish(cuda_loss *loss, const clipft_tensor *upstream, double factor, cuda_gradients *grad, clipft_tensor *d_scale)
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
    double *dot = cuda_loss_work(loss, clipft_torch.aoti_torch_dtype_float64(), dots);
    if (!dot) return false;
    for (int k = 0; k < 2; ++k) {
        const struct side *side = &sides[k];
        if (!side->sum) continue;
        const int64_t rows = side->value->size[0];
        clipft_cuda_gradient_finish_args args = {
            .sum = loss->rows > 0 ? side->sum : NULL, /* of no image there is none */
            .value = device_matrix(side->value),
            .other = device_matrix(side->other),
            .pair = grad->pair,
            .rows = rows,
            .dim = loss->dim,
            .pairs = loss->rows,
            .pair_first = side->pair_first,
            .other_first = side->other_first,
            .scale = in->scale.data,
            .grad = upstream->data,
            .factor = factor,
            .unit = grad->unit,
            .out = {grad->out.kind == CLIPFT_CUDA_FLOAT32 ? side->out->data : NULL,
                    grad->out.kind == CLIPFT_CUDA_FLOAT32 ? NULL : side->out->data, grad->out.kind},
            .dot = k == 0 || !grad->image_sum ? dot : NULL,
        };
        if (!cuda_loss_launch(loss, CLIPFT_CUDA_gradient_finish, cuda_blocks(rows, CLIPFT_CUDA_WARPS), 1, CLIPFT_CUDA_THREADS, &args))
            return false;
    }
    const clipft_cuda_sum_args sum = {.a = dot, .a_count = dots, .factor = factor, .grad = upstream->data};
    return cuda_loss_sum(loss, float32(), sum, d_scale);
}

void cuda_gradients_free(cuda_gradients *grad)
{
    clipft_release(&grad->image);
    clipft_release(&grad->text);
}
