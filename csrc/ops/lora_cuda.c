/* lora_linear, its gradients, dropout_mask and quick_gelu on CUDA: the products with W are torch's, the others cuda/lora.cu; see
 * kernels/lora/lora.h for the mathematics.
 *
 * Each product is one launch over all rows: blocks of rows that the L2 cache holds would spare reads, but leave most of a GPU idle. Only
 * act(x) goes through in such blocks, and so is never there as a whole (but for W's own gradient). The branch is added in float32 to what
 * the large product rounded. */
#include "../cuda_runtime/call.h"
#include "lora_inputs.h"

enum { MIN_ROWS = 512, ROW_ALIGN = 32, MAX_GRID_Y = 32768, TENSOR_CORES = 80 /* sm_80 has the instruction */ };

typedef struct lora_job {
    lora_inputs in;
    cuda_call call;
    int64_t act_rows;  /* that act(x) has room for */
    bool tensor_cores; /* take products of bfloat16 */
} lora_job;

static bool begin(lora_job *job)
{
    const lora_inputs *in = &job->in;
    const int64_t item = in->x.kind == CLIPFT_FLOAT32 ? (int64_t)sizeof(float) : (int64_t)sizeof(uint16_t);
    if (in->rows > INT32_MAX || in->in > INT32_MAX || in->out > INT32_MAX || in->rank > INT32_MAX)
        return clipft_fail(job->call.error, CLIPFT_VALUE_ERROR, "on CUDA rows, features and rank must be below 2^31");
    if (!cuda_begin(&job->call, CLIPFT_CUDA_FILE_lora, &in->input)) return false;
    job->tensor_cores = in->x.kind == CLIPFT_BFLOAT16 && clipft_cuda_capability(in->input.index) >= TENSOR_CORES;
    if (job->tensor_cores && !cuda_begin(&job->call, CLIPFT_CUDA_FILE_lora_tensor, &in->input)) return false;
    const int64_t fit = clipft_cuda_l2_bytes(in->input.index) / 2 / (item * in->in);
    job->act_rows = fit < MIN_ROWS ? MIN_ROWS : fit / ROW_ALIGN * ROW_ALIGN;
    if (job->act_rows > in->rows) job->act_rows = in->rows;
    return true;
}

/* Into how many parts a sum goes, at most `most`, for about `wanted` blocks. */
static int64_t parts_of(int64_t blocks, int64_t wanted, int64_t most)
{
    const int64_t parts = blocks > 0 ? wanted / blocks : 1;
    return parts > most ? most : parts < 1 ? 1 : parts;
}

/* ---- kernels ---- */

/* On tensor cores where the matrix's layout lets them; else the first of four, or another by its path. */
static clipft_cuda_kernel kernel_for(const lora_job *job, int path, clipft_cuda_kernel tensor, clipft_cuda_kernel first)
{
    return job->tensor_cores && path == CLIPFT_CUDA_BFLOAT16 ? tensor : cuda_by_path(first, path);
}

static clipft_cuda_dropout dropout(const lora_job *job)
{
    const clipft_dropout *d = &job->in.lora.dropout;
    return (clipft_cuda_dropout){d->active ? job->in.seed.data : NULL, d->threshold};
}

/* x as the branch takes it; or dy as it is. */
static clipft_cuda_branch branch_of(const lora_job *job)
{
    const clipft_view *x = &job->in.x;
    return (clipft_cuda_branch){cuda_matrix(x), dropout(job), (int)x->rows, (int)x->cols, job->in.lora.quick_gelu};
}

static clipft_cuda_branch plain(const clipft_view *m)
{
    return (clipft_cuda_branch){.x = cuda_matrix(m), .rows = (int)m->rows, .cols = (int)m->cols};
}

/* out = scale * (sum of parts [parts, rank, cols]), a view of a contiguous tensor. */
static bool sum(lora_job *job, const float *part, int64_t parts, float scale, const clipft_view *out)
{
    clipft_cuda_lora_sum_args args = {part,  cuda_target(out), (int)parts,     (int)out->rows, (int)out->cols,
                                      scale, out->row_stride,  out->col_stride};
    return cuda_launch(&job->call, CLIPFT_CUDA_lora_sum, cuda_blocks(out->cols, 32), out->rows, CLIPFT_CUDA_THREADS, &args);
}

/* v [rows, padded] = scale * branch panel^T, panel [rank, cols]. */
static bool down(lora_job *job, clipft_cuda_branch branch, const clipft_view *panel, float scale, float *v)
{
    const int64_t padded = job->in.padded, blocks = cuda_blocks(branch.rows, CLIPFT_CUDA_LORA_DOWN_ROWS), size = branch.rows * padded;
    const int64_t ranks = padded / CLIPFT_CUDA_LORA_RANK;
    const int64_t parts = parts_of(blocks * ranks, CLIPFT_CUDA_LORA_DOWN_BLOCKS, cuda_blocks(branch.cols, CLIPFT_CUDA_LORA_COLS));
    float *to = parts > 1 ? cuda_work(&job->call, clipft_dtype_float32(), parts * size) : v;
    clipft_cuda_lora_down_args args = {branch,     cuda_matrix(panel),      to, (int)job->in.rank, (int)padded,
                                       (int)parts, parts > 1 ? 1.0F : scale};
    const clipft_view whole = {v, 1, size, size, 1, CLIPFT_FLOAT32};
    return to &&
           cuda_launch(&job->call, kernel_for(job, branch.x.path, CLIPFT_CUDA_lora_tensor_down, CLIPFT_CUDA_lora_down_f32), blocks,
                       ranks * parts, CLIPFT_CUDA_THREADS, &args) &&
           (parts == 1 || sum(job, to, parts, scale, &whole));
}

/* Sets all but the activation's input. */
static clipft_cuda_lora_up_args up_args(const lora_job *job, const float *v, const clipft_view *panel, const clipft_view *out, float scale)
{
    return (clipft_cuda_lora_up_args){.v = {v, (int)job->in.padded},
                                      .panel = cuda_matrix(panel),
                                      .base = cuda_matrix(out),
                                      .out = cuda_target(out),
                                      .rows = (int)out->rows,
                                      .cols = (int)out->cols,
                                      .rank = (int)job->in.rank,
                                      .scale = scale};
}

static bool up(lora_job *job, clipft_cuda_lora_up_args *args)
{
    const bool activation = args->x.data32 || args->x.data16;
    const int path = activation && args->x.path != args->base.path ? CLIPFT_CUDA_ANY_LAYOUT : args->base.path;
    return cuda_launch(&job->call, kernel_for(job, path, CLIPFT_CUDA_lora_tensor_up, CLIPFT_CUDA_lora_up_f32),
                       cuda_blocks(args->rows, CLIPFT_CUDA_LORA_UP_ROWS), cuda_blocks(args->cols, CLIPFT_CUDA_LORA_COLS),
                       CLIPFT_CUDA_THREADS, args);
}

/* out [rank, cols] = scale * v^T branch, a view of a contiguous tensor; v NULL: of ones, and rank 1. */
static bool outer(lora_job *job, const float *v, clipft_cuda_branch branch, float scale, const clipft_view *out)
{
    const int64_t rank = out->rows, blocks = cuda_blocks(branch.cols, CLIPFT_CUDA_LORA_COLS) * cuda_blocks(rank, CLIPFT_CUDA_LORA_RANK);
    const int64_t parts = parts_of(blocks, CLIPFT_CUDA_LORA_OUTER_BLOCKS, cuda_blocks(branch.rows, CLIPFT_CUDA_LORA_PART_ROWS));
    float *part = cuda_work(&job->call, clipft_dtype_float32(), parts * rank * out->cols);
    clipft_cuda_lora_outer_args args = {{v, (int)job->in.padded}, branch, part, (int)rank, (int)parts};
    return part &&
           cuda_launch(&job->call, kernel_for(job, branch.x.path, CLIPFT_CUDA_lora_tensor_outer, CLIPFT_CUDA_lora_outer_f32), blocks, parts,
                       CLIPFT_CUDA_LORA_OUTER_THREADS, &args) &&
           sum(job, part, parts, scale, out);
}

/* out = quick_gelu(x), or grad * its derivative. */
static bool quick_gelu(cuda_call *call, const clipft_view *x, const clipft_view *grad, const clipft_view *out)
{
    clipft_cuda_quick_gelu_args args = {cuda_matrix(x), grad ? cuda_matrix(grad) : (clipft_cuda_matrix){0}, cuda_target(out), x->rows,
                                        x->cols};
    const int64_t rows = cuda_blocks(x->rows, CLIPFT_CUDA_GELU_ROWS);
    return cuda_launch(call, CLIPFT_CUDA_lora_quick_gelu, cuda_blocks(x->cols, CLIPFT_CUDA_GELU_COLS),
                       rows < MAX_GRID_Y ? rows : MAX_GRID_Y, CLIPFT_CUDA_THREADS, &args);
}

/* ---- forward ---- */

/* y = act(x) W^T + bias. */
static bool multiply(lora_job *job, clipft_view y, clipft_view act)
{
    const lora_inputs *in = &job->in;
    return cuda_multiply(&job->call, y, in->bias_row.data ? &in->bias : NULL, false, act, clipft_view_transposed(in->w));
}

/* The same through room for some of act(x)'s rows. */
static bool multiply_activated(lora_job *job, clipft_view y)
{
    const lora_inputs *in = &job->in;
    const int64_t step = job->act_rows;
    const clipft_view room = {cuda_work(&job->call, in->input.dtype, step * in->in), step, in->in, in->in, 1, in->x.kind};
    if (!room.data) return false;
    for (int64_t begin = 0, end; begin < in->rows; begin = end) {
        end = begin + step < in->rows ? begin + step : in->rows;
        const clipft_view x = clipft_view_rows(in->x, begin, end), act = clipft_view_rows(room, 0, end - begin);
        if (!quick_gelu(&job->call, &x, NULL, &act) || !multiply(job, clipft_view_rows(y, begin, end), act)) return false;
    }
    return true;
}

static bool forward(lora_job *job, const clipft_view *y, float *v)
{
    const lora_inputs *in = &job->in;
    const clipft_view b_t = clipft_view_transposed(in->lora.lora_b);
    clipft_cuda_lora_up_args args = up_args(job, v, &b_t, y, in->lora.scale);
    return in->rows == 0 || ((in->lora.quick_gelu ? multiply_activated(job, *y) : multiply(job, *y, in->x)) &&
                             down(job, branch_of(job), &in->lora.lora_a, 1.0F, v) && up(job, &args));
}

static void run_lora_linear(const lora_linear_args *args, lora_linear_results *results, clipft_error *error)
{
    lora_job job = {.call.error = error};
    clipft_tensor output = {0}, rank = {0};
    clipft_view y;

    if (lora_take_forward(&job.in, args, error) && begin(&job) && lora_make_output(&job.in, &output, &y, &rank, error) &&
        forward(&job, &y, rank.data))
        *results = (lora_linear_results){clipft_box(&output), clipft_box(&rank)};
    clipft_release(&output);
    clipft_release(&rank);
    cuda_end(&job.call);
    lora_free_inputs(&job.in);
}
CLIPFT_CUDA_ENTRY(lora_linear)

/* ---- backward ---- */

/* u, and dx around its large product. */
static bool input_gradient(lora_job *job, const clipft_view *dy, const lora_gradients *g)
{
    const lora_inputs *in = &job->in;
    const clipft_view b_t = clipft_view_transposed(in->lora.lora_b);
    float *u = g->u.data;
    if (!down(job, plain(dy), &b_t, in->lora.scale, u)) return false;
    if (!g->d_x.data) return true;
    clipft_cuda_lora_up_args args = up_args(job, u, &in->lora.lora_a, &g->d_x, 1.0F);
    args.dropout = dropout(job);
    if (in->lora.quick_gelu) args.x = cuda_matrix(&in->x);
    return cuda_multiply(&job->call, g->d_x, NULL, false, *dy, in->w) && up(job, &args);
}

static bool weight_gradient(lora_job *job, const clipft_view *dy, const lora_gradients *g)
{
    const clipft_view *x = &job->in.x;
    if (g->act.data && !quick_gelu(&job->call, x, NULL, &g->act)) return false;
    return cuda_multiply(&job->call, g->d_w, NULL, false, clipft_view_transposed(*dy), g->act.data ? g->act : *x);
}

static bool backward(lora_job *job, const lora_saved *saved, const lora_gradients *g)
{
    const lora_inputs *in = &job->in;
    const clipft_view d_b = clipft_view_transposed(g->d_b), *dy = &saved->dy;
    return (!g->u.data || in->rows == 0 || input_gradient(job, dy, g)) &&
           (!g->d_a.data || outer(job, g->u.data, branch_of(job), 1.0F, &g->d_a)) &&
           (!g->d_b.data || outer(job, saved->rank.data, plain(dy), in->lora.scale, &d_b)) &&
           (!g->d_bias.data || outer(job, NULL, plain(dy), 1.0F, &g->d_bias)) && (!g->d_w.data || weight_gradient(job, dy, g));
}

static void run_lora_linear_backward(const lora_linear_backward_args *args, lora_linear_backward_results *results, clipft_error *error)
{
    lora_job job = {.call.error = error};
    lora_saved saved = {0};
    lora_gradients g = {0};

    if (lora_take_backward(&job.in, &saved, args, error) && begin(&job) && lora_make_gradients(&g, &job.in, args, error) &&
        backward(&job, &saved, &g))
        *results = lora_box_gradients(&g);
    lora_free_gradients(&g);
    cuda_end(&job.call);
    lora_free_inputs(&job.in);
    lora_free_saved(&saved);
}
CLIPFT_CUDA_ENTRY(lora_linear_backward)

/* ---- the mask, and quick_gelu, alone ---- */

static void run_dropout_mask(const dropout_mask_args *args, dropout_mask_results *results, clipft_error *error)
{
    cuda_call call = {.error = error};
    const int64_t sizes[] = {clipft_unbox_int(args->rows), clipft_unbox_int(args->cols)};
    clipft_tensor seed, mask = {0};
    clipft_dropout dropout;

    if (!clipft_unbox(args->seed, "seed", &seed, error) || !lora_check_dropout(&seed, clipft_unbox_float(args->dropout), &dropout, error) ||
        !lora_check_mask(sizes, error) || !cuda_begin(&call, CLIPFT_CUDA_FILE_lora, &seed) ||
        !clipft_empty_beside(&seed, clipft_dtype_float32(), 2, sizes, &mask, error))
        goto done;
    clipft_cuda_dropout_mask_args launch = {{dropout.active ? seed.data : NULL, dropout.threshold}, mask.data, sizes[0], sizes[1]};
    if (cuda_launch(&call, CLIPFT_CUDA_lora_dropout_mask, cuda_blocks(sizes[1], CLIPFT_CUDA_THREADS),
                    sizes[0] < MAX_GRID_Y ? sizes[0] : MAX_GRID_Y, CLIPFT_CUDA_THREADS, &launch))
        results->result = clipft_box(&mask);
done:
    clipft_release(&mask);
    clipft_release(&seed);
    cuda_end(&call);
}
CLIPFT_CUDA_ENTRY(dropout_mask)

static void run_quick_gelu(const quick_gelu_args *args, quick_gelu_results *results, clipft_error *error)
{
    cuda_call call = {.error = error};
    clipft_tensor input = {0}, out = {0};
    clipft_view x, y;
    if (gelu_take(args->input, "input", &input, &x, error) && cuda_begin(&call, CLIPFT_CUDA_FILE_lora, &input) &&
        gelu_make_result(&input, &out, &y, error) && quick_gelu(&call, &x, NULL, &y))
        results->result = clipft_box(&out);
    clipft_release(&out);
    clipft_release(&input);
    cuda_end(&call);
}
CLIPFT_CUDA_ENTRY(quick_gelu)

static void run_quick_gelu_backward(const quick_gelu_backward_args *args, quick_gelu_backward_results *results, clipft_error *error)
{
    cuda_call call = {.error = error};
    clipft_tensor grad = {0}, input = {0}, out = {0};
    clipft_view dy, x, dx;
    if (gelu_take_gradient(args, &grad, &dy, &input, &x, error) && cuda_begin(&call, CLIPFT_CUDA_FILE_lora, &input) &&
        gelu_make_result(&input, &out, &dx, error) && quick_gelu(&call, &x, &dy, &dx))
        results->result = clipft_box(&out);
    clipft_release(&out);
    clipft_release(&grad);
    clipft_release(&input);
    cuda_end(&call);
}
CLIPFT_CUDA_ENTRY(quick_gelu_backward)
