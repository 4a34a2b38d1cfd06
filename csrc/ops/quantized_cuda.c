/* quantized_linear and quantized_chain on CUDA: rows to int8, torch's integer product (cuBLAS), sums to results; see cuda/quantized.cu.
 *
 * Both take weights as they are saved, [out, in] int8: quantized_chain's `packed` is that here. Rows go through in blocks whose sums the L2
 * cache holds, through both layers where there are two. The product wants more than 16 rows, and features and channels in multiples of 8
 * (torch 2.14, aten/src/ATen/native/cuda/Blas.cpp): rows are padded in the work space, and weights of other sizes copied into it. */
#include "../cuda_runtime/call.h"
#include "../kernels/common/sizes.h"
#include "quantized_inputs.h"

enum { ROW_PAD = 32, DEPTH_PAD = 8, MIN_ROWS = 256, MAX_ROWS = 32768 };

typedef struct operand {
    const clipft_int8_layer *layer;
    void *weight; /* [out, in] as below, contiguous */
    int64_t out, in;
} operand;

typedef struct int8_job {
    const int8_inputs *in;
    clipft_view y;
    cuda_call call;
    operand layers[CLIPFT_INT8_LAYERS];
    int64_t block_rows;
    void *q;      /* [block_rows, in] of either layer */
    int *sums;    /* [block_rows, out] of either layer */
    float *scale; /* [block_rows] */
} int8_job;

static AtenTensorHandle wrap(const cuda_call *call, void *data, int32_t dtype, int64_t rows, int64_t cols, int64_t row_stride,
                             int64_t col_stride)
{
    return clipft_wrap_memory(data, dtype, (const int64_t[]){rows, cols}, (const int64_t[]){row_stride, col_stride}, call->beside->device,
                              call->beside->index);
}

/* What lies beyond a copied weight's rows and features meets zeros or is never read. */
static bool make_operand(int8_job *job, int k)
{
    const clipft_tensor *weight = &job->in->layers[k].weight;
    const clipft_int8_layer *layer = &job->in->chain.layers[k];
    const int32_t int8 = clipft_dtype_int8();
    operand *o = &job->layers[k];
    *o = (operand){layer, weight->data, clipft_round_up(layer->out, DEPTH_PAD), clipft_round_up(layer->in, DEPTH_PAD)};
    const bool in_order = weight->stride[1] == 1 && weight->stride[0] == layer->in && (uintptr_t)weight->data % 16 == 0;
    if (o->out == layer->out && o->in == layer->in && in_order) return true;
    o->weight = cuda_work(&job->call, int8, o->out * o->in);
    AtenTensorHandle to = o->weight ? wrap(&job->call, o->weight, int8, layer->out, layer->in, o->in, 1) : NULL;
    const bool ok = to && !clipft_torch_cuda.aoti_torch_copy_(to, weight->handle, 0);
    clipft_delete(to);
    return ok || cuda_torch_failed(&job->call, "copying a weight");
}

static bool multiply(int8_job *job, const operand *o, int64_t rows)
{
    const int64_t padded = clipft_round_up(rows, ROW_PAD);
    const int32_t int8 = clipft_dtype_int8(), int32 = clipft_dtype_int32();
    AtenTensorHandle out = wrap(&job->call, job->sums, int32, padded, o->out, o->out, 1),
                     left = wrap(&job->call, job->q, int8, padded, o->in, o->in, 1),
                     right = wrap(&job->call, o->weight, int8, o->in, o->out, 1, o->in);
    bool ok = out && left && right;
    if (ok && clipft_torch_cuda.aoti_torch_cuda__int_mm_out)
        ok = !clipft_torch_cuda.aoti_torch_cuda__int_mm_out(out, left, right);
    else if (ok)
        ok = clipft_torch_product("aten::_int_mm", "out", out, left, right, -1);
    clipft_delete(out);
    clipft_delete(left);
    clipft_delete(right);
    return ok || cuda_torch_failed(&job->call, "an integer matrix product");
}

/* With as many warps to a row as hold it. */
static clipft_cuda_int8_rows rows_for(const int8_job *job, const operand *o, int64_t rows)
{
    const int words = (int)o->in / 4;
    int team = 1;
    while (team < CLIPFT_CUDA_WARPS && words > team * 32 * CLIPFT_CUDA_INT8_HELD) team *= 2;
    return (clipft_cuda_int8_rows){job->q, job->scale, (int)rows, (int)o->layer->in, words, team};
}

static int64_t blocks_for(const clipft_cuda_int8_rows *rows) { return cuda_blocks(rows->rows, CLIPFT_CUDA_WARPS / rows->team); }

static clipft_cuda_int8_sums sums_of(const int8_job *job, const operand *o)
{
    return (clipft_cuda_int8_sums){
        job->sums, job->scale, cuda_matrix(&o->layer->scale), cuda_matrix(&o->layer->bias), (int)o->out, (int)o->layer->activation};
}

/* Rows begin .. end - 1 through the layers. */
static bool run_block(int8_job *job, int64_t begin, int64_t end)
{
    const clipft_int8_chain *chain = &job->in->chain;
    const operand *first = job->layers, *last = &job->layers[chain->count - 1];
    const int64_t rows = end - begin;
    const clipft_view x = clipft_view_rows(job->in->x, begin, end), y = clipft_view_rows(job->y, begin, end);
    const clipft_view residual = chain->residual.data ? clipft_view_rows(chain->residual, begin, end) : (clipft_view){0};
    clipft_cuda_int8_quantize_args quantize = {cuda_matrix(&x), cuda_matrix(&chain->norm_weight), cuda_matrix(&chain->norm_bias),
                                               chain->norm_eps, rows_for(job, first, rows)};
    bool ok = cuda_launch(&job->call, cuda_by_path(CLIPFT_CUDA_int8_quantize_f32, quantize.x.path), blocks_for(&quantize.out), 1,
                          CLIPFT_CUDA_THREADS, &quantize) &&
              multiply(job, first, rows);
    if (ok && last != first) {
        clipft_cuda_int8_requantize_args requantize = {sums_of(job, first), rows_for(job, last, rows)};
        ok = cuda_launch(&job->call, CLIPFT_CUDA_int8_requantize, blocks_for(&requantize.out), 1, CLIPFT_CUDA_THREADS, &requantize) &&
             multiply(job, last, rows);
    }
    clipft_cuda_int8_finish_args finish = {sums_of(job, last), cuda_matrix(&residual), cuda_target(&y), (int)rows, (int)y.cols};
    const int path = residual.data && finish.residual.path != finish.out.path ? CLIPFT_CUDA_ANY_LAYOUT : finish.out.path;
    return ok && cuda_launch(&job->call, cuda_by_path(CLIPFT_CUDA_int8_finish_f32, path), cuda_blocks(y.cols, CLIPFT_CUDA_INT8_FINISH_COLS),
                             cuda_blocks(rows, CLIPFT_CUDA_INT8_FINISH_ROWS), CLIPFT_CUDA_THREADS, &finish);
}

static bool prepare(int8_job *job, const clipft_tensor *input)
{
    int64_t in = 1, out = 1;
    for (int k = 0; k < job->in->chain.count; ++k) {
        if (!make_operand(job, k)) return false;
        if (job->layers[k].in > in) in = job->layers[k].in;
        if (job->layers[k].out > out) out = job->layers[k].out;
    }
    const int64_t fit = clipft_cuda_l2_bytes(input->index) / (out * (int64_t)sizeof *job->sums) / ROW_PAD * ROW_PAD;
    const int64_t rows = clipft_round_up(job->in->x.rows, ROW_PAD);
    job->block_rows = fit < MIN_ROWS ? MIN_ROWS : fit > MAX_ROWS ? MAX_ROWS : fit;
    if (job->block_rows > rows) job->block_rows = rows;
    job->q = cuda_work(&job->call, clipft_dtype_int8(), job->block_rows * in);
    job->sums = cuda_work(&job->call, clipft_dtype_int32(), job->block_rows * out);
    job->scale = cuda_work(&job->call, clipft_dtype_float32(), job->block_rows);
    return job->q && job->sums && job->scale;
}

/* Everything checked, if `ok`: the result, and what is taken is freed. */
static void run(int8_inputs *in, bool ok, clipft_slot_Tensor *result, clipft_error *error)
{
    int8_job job = {.in = in, .call.error = error};
    clipft_tensor output = {0};
    ok = ok && cuda_begin(&job.call, CLIPFT_CUDA_FILE_quantized, &in->input) && int8_make_output(in, &output, &job.y, error) &&
         (in->x.rows == 0 || prepare(&job, &in->input));
    for (int64_t row = 0; ok && row < in->x.rows; row += job.block_rows)
        ok = run_block(&job, row, row + job.block_rows < in->x.rows ? row + job.block_rows : in->x.rows);
    if (ok) *result = clipft_box(&output);
    clipft_release(&output);
    cuda_end(&job.call);
    int8_inputs_free(in);
}

static void run_quantized_linear(const quantized_linear_args *args, quantized_linear_results *results, clipft_error *error)
{
    int8_inputs in = {0};
    run(&in, int8_take_linear(&in, args, error), &results->result, error);
}
CLIPFT_CUDA_ENTRY(quantized_linear)

static void run_quantized_chain(const quantized_chain_args *args, quantized_chain_results *results, clipft_error *error)
{
    int8_inputs in = {0};
    run(&in, int8_take_chain(&in, args, int8_check_plain, error), &results->result, error);
}
CLIPFT_CUDA_ENTRY(quantized_chain)
