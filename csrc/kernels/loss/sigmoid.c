/* The pairwise sigmoid loss (SigLIP, arXiv:2303.15343) without its N x N matrix.
 *
 * z = s I T^T + b,  L = (sum over positive pairs softplus(-z) + sum elsewhere softplus(z)) / N,
 * dz = (sigmoid(z), -sigmoid(-z) on positive pairs) / N,  dI = s dz T,  dT = s dz^T I,  ds = sum_i <(dz T)_i, I_i>,  db = sum dz.
 * Positive are a row's own pair and, where there are classes, all of its class. Each has its own term, never a negative's less z.
 * One pass over the tiles forward, one backward: 8 N^2 D operations, 6 where all tiles are kept. */
#include "../table.h"
#include "tiles.h"

#include <math.h>
#include <string.h>

typedef struct sigmoid_job {
    const clipft_logits *logits;
    clipft_tile tile;
    clipft_sigmoid_terms terms;
    double gain;
    double *row_sum; /* [rows] losses forward, sums of dz backward */
} sigmoid_job;

static double softplus(double z) { return fmax(z, 0.0) + log1p(exp(-fabs(z))); }

/* The ids of the tile's columns from `first` on, if there are classes. */
static const int32_t *column_ids(const sigmoid_job *job, int64_t first)
{
    return job->terms.class_ids ? job->terms.class_ids + job->tile.col0 + first : NULL;
}

/* The id of the tile's row i, that of its own pair. */
static int32_t row_id(const sigmoid_job *job, int64_t i)
{
    return job->terms.class_ids ? job->terms.class_ids[job->logits->row_offset + job->tile.row0 + i] : 0;
}

static void forward_rows(int64_t begin, int64_t end, void *ctx)
{
    const sigmoid_job *job = ctx;
    const clipft_matrix x = job->tile.x;
    const float scale = job->logits->scale, bias = job->terms.bias;
    for (int64_t i = begin; i < end; ++i) {
        const float *row = x.data + i * x.row_stride;
        const int64_t pair = clipft_tile_pair(job->logits, &job->tile, i), before = pair < 0 ? x.cols : pair;
        const int32_t id = row_id(job, i);
        double sum = (double)clipft_kernel_table.loss.row_softplus_sum(row, before, scale, bias, column_ids(job, 0), id);
        if (pair >= 0) {
            const int64_t after = pair + 1;
            sum += softplus(-((double)scale * (double)row[pair] + (double)bias));
            sum += (double)clipft_kernel_table.loss.row_softplus_sum(row + after, x.cols - after, scale, bias, column_ids(job, after), id);
        }
        job->row_sum[job->tile.row0 + i] += sum;
    }
}

static void backward_rows(int64_t begin, int64_t end, void *ctx)
{
    const sigmoid_job *job = ctx;
    const clipft_matrix x = job->tile.x;
    for (int64_t i = begin; i < end; ++i) {
        const float *row = x.data + i * x.row_stride;
        float *out = job->tile.out.data + i * job->tile.out.row_stride;
        const int64_t pair = clipft_tile_pair(job->logits, &job->tile, i);
        const double z = pair < 0 ? 0.0 : (double)job->logits->scale * (double)row[pair] + (double)job->terms.bias;
        const int64_t before = pair < 0 ? x.cols : pair, after = before + 1;
        const float scale = job->logits->scale, bias = job->terms.bias, gain = (float)job->gain;
        const int32_t id = row_id(job, i);
        double sum = (double)clipft_kernel_table.loss.row_sigmoid_grad(row, out, before, scale, bias, gain, column_ids(job, 0), id);
        if (pair >= 0) { /* its sigmoid, near 1, would take the others out of a float32 sum; sigmoid(z) - 1 = -sigmoid(-z) */
            const double exact = -job->gain / (1.0 + exp(z));
            sum += exact;
            sum += (double)clipft_kernel_table.loss.row_sigmoid_grad(row + after, out + after, x.cols - after, scale, bias, gain,
                                                                     column_ids(job, after), id);
            out[pair] = (float)exact;
        }
        job->row_sum[job->tile.row0 + i] += sum;
    }
}

/* Runs `rows` over every tile; with gradients wanted accumulates them. *total = sum of row_sum. */
static bool sigmoid_walk(sigmoid_job *job, const clipft_host *host, void (*rows_fn)(int64_t, int64_t, void *), bool backward,
                         clipft_matrix d_image, clipft_matrix d_text, double *total)
{
    const clipft_logits *logits = job->logits;
    const int64_t rows = logits->image.rows;
    const int64_t work_items = backward || logits->kept_rows < rows ? CLIPFT_TILE_ITEMS : 0;
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, work_items, sizeof(float));
    clipft_arena_reserve(&arena, rows, sizeof(double));
    if (!clipft_arena_allocate(&arena)) goto done;

    float *work = clipft_arena_take(&arena, work_items, sizeof(float));
    job->row_sum = clipft_arena_take(&arena, rows, sizeof(double));
    for (int64_t i = 0; i < rows; ++i) job->row_sum[i] = 0.0;

    int64_t row0 = 0, col0 = 0;
    bool more = rows > 0;
    for (ok = true; ok && more; more = clipft_tile_next(logits, &row0, &col0)) {
        ok = clipft_tile_load(logits, host, row0, col0, work, backward, &job->tile) &&
             host->parallel_for(0, job->tile.x.rows, CLIPFT_CHUNK, rows_fn, job);
        if (ok && backward) ok = clipft_tile_accumulate(logits, host, &job->tile, d_image, d_text);
    }
    *total = 0.0;
    for (int64_t i = 0; ok && i < rows; ++i) *total += job->row_sum[i];
done:
    clipft_arena_free(&arena);
    return ok;
}

bool clipft_sigmoid_forward(const clipft_logits *logits, const clipft_sigmoid_terms *terms, const clipft_host *host, double *loss)
{
    sigmoid_job job = {.logits = logits, .terms = *terms};
    const clipft_matrix none = {0};
    const bool ok = sigmoid_walk(&job, host, forward_rows, false, none, none, loss);
    *loss /= (double)logits->text.rows;
    return ok;
}

bool clipft_sigmoid_backward(const clipft_logits *logits, const clipft_sigmoid_terms *terms, const clipft_host *host, double grad,
                             clipft_matrix d_image, clipft_matrix d_text, double *d_scale, double *d_bias)
{
    sigmoid_job job = {.logits = logits, .terms = *terms, .gain = grad / (double)logits->text.rows};
    if (logits->image.rows == 0 && d_text.data) memset(d_text.data, 0, (size_t)(d_text.rows * d_text.cols) * sizeof(float));
    return sigmoid_walk(&job, host, backward_rows, true, d_image, d_text, d_bias) &&
           clipft_finish_gradients(logits, host, d_image, d_text, d_scale);
}
