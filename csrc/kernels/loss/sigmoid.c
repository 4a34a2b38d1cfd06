/* The pairwise sigmoid loss (SigLIP, arXiv:2303.15343) without its N x N matrix.
 *
 * z = s I T^T + b,  L = (sum over positive pairs softplus(-z) + sum elsewhere softplus(z)) / N,
 * dz = (sigmoid(z), -sigmoid(-z) on positive pairs) / N,  dI = s dz T,  dT = s dz^T I,  ds = sum_i <(dz T)_i, I_i>,  db = sum dz.
 * Positive are a row's own pair and, where there are classes, all of its class. Each has its own term, never a negative's less z.
 * The gradient needs nothing of other tiles, so one pass over them makes the loss and its gradients: 6 N^2 D operations, and no tile is
 * kept or made again. */
#include "../table.h"
#include "tiles.h"

#include <math.h>
#include <string.h>

typedef struct sigmoid_job {
    const clipft_logits *logits;
    clipft_tile tile;
    clipft_sigmoid_terms terms;
    bool gradients;
    double *loss, *d_bias; /* [rows] */
} sigmoid_job;

static double softplus(double z) { return fmax(z, 0.0) + log1p(exp(-fabs(z))); }

/* A row of the tile: its products before and after its pair's, and the ids of these columns where there are classes. */
typedef struct sigmoid_row {
    const float *x;
    int64_t pair, before, after, rest; /* the pair's column, or -1; columns before it, where those after it begin, and how many */
    double z;                          /* the pair's logit */
    const int32_t *ids, *ids_after;
    int32_t id;
} sigmoid_row;

static sigmoid_row row_of(const sigmoid_job *job, int64_t i)
{
    const clipft_tile *tile = &job->tile;
    const int32_t *ids = job->terms.class_ids;
    sigmoid_row row = {.x = tile->x.data + i * tile->x.row_stride, .pair = clipft_tile_pair(job->logits, tile, i)};
    row.before = row.pair < 0 ? tile->x.cols : row.pair;
    row.after = row.pair < 0 ? tile->x.cols : row.pair + 1;
    row.rest = tile->x.cols - row.after;
    if (row.pair >= 0) row.z = (double)job->logits->scale * (double)row.x[row.pair] + (double)job->terms.bias;
    if (!ids) return row;
    row.ids = ids + tile->col0, row.ids_after = row.ids + row.after;
    row.id = ids[job->logits->row_offset + tile->row0 + i];
    return row;
}

static double row_loss(const sigmoid_job *job, const sigmoid_row *row)
{
    const clipft_loss_kernels *kernels = &clipft_kernel_table.loss;
    const float scale = job->logits->scale, bias = job->terms.bias, *after = row->x + row->after;
    const double sum = (double)kernels->row_softplus_sum(row->x, row->before, scale, bias, row->ids, row->id);
    if (row->pair < 0) return sum;
    return sum + softplus(-row->z) + (double)kernels->row_softplus_sum(after, row->rest, scale, bias, row->ids_after, row->id);
}

/* Writes dz into the tile's row i and returns its sum. */
static double row_gradient(const sigmoid_job *job, const sigmoid_row *row, int64_t i)
{
    const double gain = 1.0 / (double)job->logits->text.rows;
    const float scale = job->logits->scale, bias = job->terms.bias, factor = (float)gain, *after = row->x + row->after;
    const clipft_loss_kernels *kernels = &clipft_kernel_table.loss;
    float *out = job->tile.out.data + i * job->tile.out.row_stride;
    double sum = (double)kernels->row_sigmoid_grad(row->x, out, row->before, scale, bias, factor, row->ids, row->id);
    if (row->pair < 0) return sum;
    /* Its sigmoid, near 1, would take the others out of a float32 sum; sigmoid(z) - 1 = -sigmoid(-z). */
    const double exact = -gain / (1.0 + exp(row->z));
    sum += exact;
    sum += (double)kernels->row_sigmoid_grad(after, out + row->after, row->rest, scale, bias, factor, row->ids_after, row->id);
    out[row->pair] = (float)exact;
    return sum;
}

static void do_rows(int64_t begin, int64_t end, void *ctx)
{
    const sigmoid_job *job = ctx;
    for (int64_t i = begin; i < end; ++i) {
        const sigmoid_row row = row_of(job, i);
        job->loss[job->tile.row0 + i] += row_loss(job, &row);
        if (job->gradients) job->d_bias[job->tile.row0 + i] += row_gradient(job, &row, i);
    }
}

static double sum_of(const double *values, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += values[i];
    return sum;
}

bool clipft_sigmoid(const clipft_logits *logits, const clipft_sigmoid_terms *terms, const clipft_host *host, double *loss,
                    const clipft_sigmoid_gradients *grad)
{
    const int64_t rows = logits->image.rows;
    sigmoid_job job = {.logits = logits, .terms = *terms, .gradients = grad != NULL};
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, CLIPFT_TILE_ITEMS, sizeof(float));
    clipft_arena_reserve(&arena, rows, sizeof(double));
    clipft_arena_reserve(&arena, rows, sizeof(double));
    if (!clipft_arena_allocate(&arena)) goto done;

    float *work = clipft_arena_take(&arena, CLIPFT_TILE_ITEMS, sizeof(float));
    job.loss = clipft_arena_take(&arena, rows, sizeof(double));
    job.d_bias = clipft_arena_take(&arena, rows, sizeof(double));
    for (int64_t i = 0; i < rows; ++i) job.loss[i] = job.d_bias[i] = 0.0;
    if (grad && rows == 0 && grad->text.data) memset(grad->text.data, 0, (size_t)(grad->text.rows * grad->text.cols) * sizeof(float));

    int64_t row0 = 0, col0 = 0;
    bool more = rows > 0;
    for (ok = true; ok && more; more = clipft_tile_next(logits, &row0, &col0)) {
        ok = clipft_tile_load(logits, host, row0, col0, work, false, &job.tile) &&
             host->parallel_for(0, job.tile.x.rows, CLIPFT_CHUNK, do_rows, &job);
        if (ok && grad) ok = clipft_tile_accumulate(logits, host, &job.tile, grad->image, grad->text);
    }
    *loss = sum_of(job.loss, rows) / (double)logits->text.rows;
    if (ok && grad) {
        *grad->bias = sum_of(job.d_bias, rows);
        ok = clipft_finish_gradients(logits, host, grad->image, grad->text, grad->scale);
    }
done:
    clipft_arena_free(&arena);
    return ok;
}
