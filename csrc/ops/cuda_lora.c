/* lora_linear, its gradients, dropout_mask and quick_gelu on CUDA: the products with W are torch's, the others cuda/lora.cu; see
 * kernels/lora.h for the mathematics.
 *
 * Rows go through in blocks: what the large product reads and writes is in the L2 cache when the rank products come to it, and act(x) is
 * never there as a whole (but for W's own gradient). The branch is added in float32 to what the large product rounded. */
#include "cuda_call.h"
#include "lora_inputs.h"
#include "ops.h"

enum { MIN_ROWS = 512, MAX_GRID_Y = 32768 };

typedef struct lora_job {
    lora_inputs in;
    cuda_call call;
    int64_t block_rows;
} lora_job;

static bool begin(lora_job *job)
{
    const lora_inputs *in = &job->in;
    const int64_t item = in->x.kind == CLIPFT_FLOAT32 ? (int64_t)sizeof(float) : (int64_t)sizeof(uint16_t);
    if (in->rows > INT32_MAX || in->in > INT32_MAX || in->out > INT32_MAX || in->rank > INT32_MAX)
        return clipft_fail(job->call.error, "on CUDA rows, features and rank must be below 2^31");
    if (!cuda_begin(&job->call, &in->input)) return false;
    const int64_t fit = clipft_cuda_l2_bytes(in->input.index) / 2 / (item * (in->in + in->out));
    job->block_rows = fit < MIN_ROWS ? MIN_ROWS : fit / CLIPFT_CUDA_LORA_ROWS * CLIPFT_CUDA_LORA_ROWS;
    return true;
}

/* Calls `visit` for one block of rows after another. */
static bool in_blocks(lora_job *job, bool (*visit)(lora_job *job, int64_t begin, int64_t end, void *ctx), void *ctx)
{
    for (int64_t row = 0; row < job->in.rows; row += job->block_rows)
        if (!visit(job, row, row + job->block_rows < job->in.rows ? row + job->block_rows : job->in.rows, ctx)) return false;
    return true;
}

/* ---- kernels ---- */

static clipft_cuda_dropout dropout_from(const lora_job *job, int64_t first)
{
    const clipft_dropout *d = &job->in.lora.dropout;
    return (clipft_cuda_dropout){d->active ? job->in.seed.data : NULL, d->threshold, first};
}

/* x, whose first row is row `first` of the input, as the branch takes it; or dy as it is. */
static clipft_cuda_branch branch_of(const lora_job *job, const clipft_view *x, int64_t first)
{
    return (clipft_cuda_branch){cuda_matrix(x), dropout_from(job, first), (int)x->rows, (int)x->cols, job->in.lora.quick_gelu};
}

static clipft_cuda_branch plain(const clipft_view *m)
{
    return (clipft_cuda_branch){.x = cuda_matrix(m), .rows = (int)m->rows, .cols = (int)m->cols};
}

/* v [rows, padded] = scale * branch panel, panel [cols, rank]. */
static bool down(lora_job *job, clipft_cuda_branch branch, const clipft_view *panel, float scale, float *v)
{
    clipft_cuda_lora_down_args args = {branch, cuda_matrix(panel), v, (int)job->in.rank, (int)job->in.padded, scale};
    return cuda_launch(&job->call, CLIPFT_CUDA_lora_down, cuda_blocks(branch.rows, CLIPFT_CUDA_LORA_ROWS),
                       job->in.padded / CLIPFT_CUDA_LORA_RANK, CLIPFT_CUDA_THREADS, &args);
}

/* Sets all but the activation's input. */
static clipft_cuda_lora_up_args up_args(const lora_job *job, const float *v, const clipft_view *panel, const clipft_view *out, float scale)
{
    return (clipft_cuda_lora_up_args){.v = v,
                                      .panel = cuda_matrix(panel),
                                      .base = cuda_matrix(out),
                                      .out = cuda_target(out),
                                      .rows = (int)out->rows,
                                      .cols = (int)out->cols,
                                      .rank = (int)job->in.rank,
                                      .padded = (int)job->in.padded,
                                      .scale = scale};
}

static bool up(lora_job *job, clipft_cuda_lora_up_args *args)
{
    return cuda_launch(&job->call, CLIPFT_CUDA_lora_up, cuda_blocks(args->rows, CLIPFT_CUDA_LORA_ROWS),
                       cuda_blocks(args->cols, CLIPFT_CUDA_LORA_UP_COLS), CLIPFT_CUDA_THREADS, args);
}

/* out [rank, cols] = scale * v^T branch, a view of a contiguous tensor; v NULL: of ones, and rank 1. */
static bool outer(lora_job *job, const float *v, clipft_cuda_branch branch, float scale, const clipft_view *out)
{
    const int64_t rank = out->rows, fit = cuda_blocks(branch.rows, (int64_t)8 * CLIPFT_CUDA_LORA_ROWS);
    const int64_t parts = fit < 1 ? 1 : fit > CLIPFT_CUDA_LORA_PARTS ? CLIPFT_CUDA_LORA_PARTS : fit;
    float *part = cuda_work(&job->call, clipft_torch.aoti_torch_dtype_float32(), parts * rank * out->cols);
    clipft_cuda_lora_outer_args args = {v, branch, part, (int)rank, (int)job->in.padded, (int)parts};
    clipft_cuda_lora_sum_args sum = {part, cuda_target(out), (int)parts, (int)rank, branch.cols, scale, out->row_stride, out->col_stride};
    return part &&
           cuda_launch(&job->call, CLIPFT_CUDA_lora_outer,
                       cuda_blocks(branch.cols, CLIPFT_CUDA_LORA_COLS) * cuda_blocks(rank, CLIPFT_CUDA_LORA_RANK), parts,
                       CLIPFT_CUDA_THREADS, &args) &&
           cuda_launch(&job->call, CLIPFT_CUDA_lora_sum, cuda_blocks(branch.cols, CLIPFT_CUDA_THREADS), rank, CLIPFT_CUDA_THREADS, &sum);
}

/* out = quick_gelu(x), or grad * its derivative. */
static bool quick_gelu(cuda_call *call, const clipft_view *x, const clipft_view *grad, const clipft_view *out)
{
    clipft_cuda_quick_gelu_args args = {cuda_matrix(x), grad ? cuda_matrix(grad) : (clipft_cuda_matrix){0}, cuda_target(out), x->rows,
                                        x->cols};
    return cuda_launch(call, CLIPFT_CUDA_lora_quick_gelu, cuda_blocks(x->cols, CLIPFT_CUDA_THREADS),
                       x->rows < MAX_GRID_Y ? x->rows : MAX_GRID_Y, CLIPFT_CUDA_THREADS, &args);
}

/* ---- forward ---- */

typedef struct forward_to {
    clipft_view y, act; /* act: room for a block, without data where there is no activation */
    float *rank;
} forward_to;

static bool forward_block(lora_job *job, int64_t begin, int64_t end, void *ctx)
{
    const forward_to *to = ctx;
    const lora_inputs *in = &job->in;
    const clipft_view x = clipft_view_rows(in->x, begin, end), y = clipft_view_rows(to->y, begin, end);
    const clipft_view act = to->act.data ? clipft_view_rows(to->act, 0, end - begin) : x;
    const clipft_view a_t = clipft_view_transposed(in->lora.lora_a), b_t = clipft_view_transposed(in->lora.lora_b);
    float *v = to->rank + begin * in->padded;
    clipft_cuda_lora_up_args args = up_args(job, v, &b_t, &y, in->lora.scale);
    return (!to->act.data || quick_gelu(&job->call, &x, NULL, &act)) &&
           cuda_multiply(&job->call, y, in->bias_row.data ? &in->bias : NULL, false, act, clipft_view_transposed(in->w)) &&
           down(job, branch_of(job, &x, begin), &a_t, 1.0F, v) && up(job, &args);
}

void clipft_cuda_lora_linear(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "lora_linear"};
    lora_job job = {.call.error = &error};
    clipft_tensor output = {0}, rank = {0};
    forward_to to = {0};

    if (!lora_take_forward(&job.in, stack, &error) || !begin(&job) || !lora_make_output(&job.in, &output, &to.y, &rank, &error)) goto done;
    to.rank = rank.data;
    if (job.in.lora.quick_gelu) {
        const int64_t rows = job.in.rows < job.block_rows ? job.in.rows : job.block_rows;
        to.act = (clipft_view){cuda_work(&job.call, job.in.input.dtype, rows * job.in.in), rows, job.in.in, job.in.in, 1, job.in.x.kind};
        if (!to.act.data) goto done;
    }
    if (in_blocks(&job, forward_block, &to)) {
        stack[0] = clipft_box(&output);
        stack[1] = clipft_box(&rank);
    }
done:
    clipft_release(&output);
    clipft_release(&rank);
    cuda_end(&job.call);
    lora_free_inputs(&job.in);
    clipft_throw(&error, __FILE__, __LINE__);
}

/* ---- backward ---- */

typedef struct backward_to {
    const clipft_view *dy;
    lora_gradients g;
} backward_to;

/* u, and dx around its large product. */
static bool backward_block(lora_job *job, int64_t begin, int64_t end, void *ctx)
{
    const backward_to *to = ctx;
    const lora_inputs *in = &job->in;
    const clipft_view dy = clipft_view_rows(*to->dy, begin, end), x = clipft_view_rows(in->x, begin, end);
    float *u = (float *)to->g.u.data + begin * in->padded;
    if (!down(job, plain(&dy), &in->lora.lora_b, in->lora.scale, u)) return false;
    if (!to->g.d_x.data) return true;
    const clipft_view d_x = clipft_view_rows(to->g.d_x, begin, end);
    clipft_cuda_lora_up_args args = up_args(job, u, &in->lora.lora_a, &d_x, 1.0F);
    args.dropout = dropout_from(job, begin);
    if (in->lora.quick_gelu) args.x = cuda_matrix(&x);
    return cuda_multiply(&job->call, d_x, NULL, false, dy, in->w) && up(job, &args);
}

static bool weight_gradient(lora_job *job, const clipft_view *dy, const lora_gradients *g)
{
    const clipft_view *x = &job->in.x;
    if (g->act.data && !quick_gelu(&job->call, x, NULL, &g->act)) return false;
    return cuda_multiply(&job->call, g->d_w, NULL, false, clipft_view_transposed(*dy), g->act.data ? g->act : *x);
}

static bool backward(lora_job *job, const lora_saved *saved, backward_to *to)
{
    const lora_inputs *in = &job->in;
    lora_gradients *g = &to->g;
    const clipft_view d_b = clipft_view_transposed(g->d_b);
    to->dy = &saved->dy;
    return (!g->u.data || in_blocks(job, backward_block, to)) &&
           (!g->d_a.data || outer(job, g->u.data, branch_of(job, &in->x, 0), 1.0F, &g->d_a)) &&
           (!g->d_b.data || outer(job, saved->rank.data, plain(&saved->dy), in->lora.scale, &d_b)) &&
           (!g->d_bias.data || outer(job, NULL, plain(&saved->dy), 1.0F, &g->d_bias)) &&
           (!g->d_w.data || weight_gradient(job, &saved->dy, g));
}

void clipft_cuda_lora_linear_backward(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "lora_linear_backward"};
    lora_job job = {.call.error = &error};
    lora_saved saved = {0};
    backward_to to = {0};

    if (lora_take_backward(&job.in, &saved, stack, &error) && begin(&job) && lora_make_gradients(&to.g, &job.in, stack + 10, &error) &&
        backward(&job, &saved, &to))
        lora_box_gradients(&to.g, stack);
    lora_free_gradients(&to.g);
    cuda_end(&job.call);
    lora_free_inputs(&job.in);
    lora_free_saved(&saved);
    clipft_throw(&error, __FILE__, __LINE__);
}

/* ---- the mask, and quick_gelu, alone ---- */

void clipft_cuda_dropout_mask(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "dropout_mask"};
    cuda_call call = {.error = &error};
    const int64_t sizes[] = {(int64_t)stack[1], (int64_t)stack[2]};
    clipft_tensor seed, mask = {0};
    clipft_dropout dropout;

    if (!clipft_unbox(stack[0], "seed", &seed, &error) || !lora_check_dropout(&seed, clipft_unbox_double(stack[3]), &dropout, &error) ||
        !lora_check_mask(sizes, &error) || !cuda_begin(&call, &seed) ||
        !clipft_empty_beside(&seed, clipft_torch.aoti_torch_dtype_float32(), 2, sizes, &mask, &error))
        goto done;
    clipft_cuda_dropout_mask_args args = {{dropout.active ? seed.data : NULL, dropout.threshold, 0}, mask.data, sizes[0], sizes[1]};
    if (cuda_launch(&call, CLIPFT_CUDA_lora_dropout_mask, cuda_blocks(sizes[1], CLIPFT_CUDA_THREADS),
                    sizes[0] < MAX_GRID_Y ? sizes[0] : MAX_GRID_Y, CLIPFT_CUDA_THREADS, &args))
        stack[0] = clipft_box(&mask);
done:
    clipft_release(&mask);
    clipft_release(&seed);
    cuda_end(&call);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_cuda_quick_gelu(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quick_gelu"};
    cuda_call call = {.error = &error};
    clipft_tensor input = {0}, out = {0};
    clipft_view x, y;
    if (gelu_take(stack[0], "input", &input, &x, &error) && cuda_begin(&call, &input) && gelu_make_result(&input, &out, &y, &error) &&
        quick_gelu(&call, &x, NULL, &y))
        stack[0] = clipft_box(&out);
    clipft_release(&out);
    clipft_release(&input);
    cuda_end(&call);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_cuda_quick_gelu_backward(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quick_gelu_backward"};
    cuda_call call = {.error = &error};
    clipft_tensor grad = {0}, input = {0}, out = {0};
    clipft_view dy, x, dx;
    if (gelu_take_gradient(stack, &grad, &dy, &input, &x, &error) && cuda_begin(&call, &input) &&
        gelu_make_result(&input, &out, &dx, &error) && quick_gelu(&call, &x, &dy, &dx))
        stack[0] = clipft_box(&out);
    clipft_release(&out);
    clipft_release(&grad);
    clipft_release(&input);
    cuda_end(&call);
    clipft_throw(&error, __FILE__, __LINE__);
}
