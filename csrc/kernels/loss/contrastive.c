/* The symmetric contrastive loss without its N x N matrix.
 *
 * S = s I T^T,  r_i = log sum_j exp S_ij,  c_j = log sum_i exp S_ij,  L = (sum r + sum c - 2 sum Q S) / 2N,
 * dS = (exp(S - r) + exp(S - c) - 2 Q) / 2N,  dI = s dS T,  dT = s dS^T I,  ds = sum_i <(dS T)_i, I_i>,
 * where Q holds the target probabilities: the diagonal, or uniform over a class, smoothed as (1 - e) Q + e / N.
 *
 * Forward walks the tiles once for r and c; backward makes each tile again (or takes it where it was kept) and turns it into dS: 8 N^2 D
 * operations, 6 where all tiles are kept. One exponential an element in each pass: forward   e = exp(S - m_i), m_i the row's maximum in the
 * tile; the column's sum takes e * exp(m_i - M), M the tile's maximum. A column whose sum comes out tiny, because its logits lie far below
 * M, is summed again on its own. backward  exp(S - c_j) = exp(S - r_i) * exp(r_i - R) * exp(R - c_j), R the largest r of the tile; with the
 * r and c of a tile too far apart for float32 the wide kernel takes two exponentials. r and c are kept in float64: at scale 100 a float32
 * one would cost every probability 4e-6 of its value. */
#include "../table.h"
#include "tiles.h"

#include <math.h>
#include <string.h>

/* A column sum of at most CLIPFT_CHUNKS * CLIPFT_CHUNK terms, each up to FLT_MIN of which may have been flushed to zero, is right to 2^-26
 * from here on. */
static const float smallest_col_sum = 1e-27F;

/* r - c beyond this takes the wide kernel: exp(-87) * exp(40), what a flushed exponential may hide, is still nothing beside a probability.
 */
static const double widest_spread = 40.0;

static void lse_merge(float *max, double *sum, float other_max, double other_sum)
{
    if (other_sum == 0.0) return; /* of nothing: its maximum is -Inf */
    if (other_max > *max) {
        *sum = *sum * exp((double)*max - (double)other_max) + other_sum;
        *max = other_max;
    } else {
        *sum += other_sum * exp((double)other_max - (double)*max);
    }
}

/* ---- forward ---- */

typedef struct forward_job {
    const clipft_logits *logits;
    const clipft_targets *targets;
    clipft_tile tile;
    float tile_max;
    float *row_max, *col_max;  /* running, [rows], [cols] */
    double *row_sum, *col_sum; /* relative to the running maxima */
    double *row_target;        /* [rows] sum of target probability * product */
    double *pair;              /* [rows] the pair's logit */
    float *tile_row_max;       /* [CLIPFT_TILE] */
    float *chunk_col_sum;      /* [CLIPFT_CHUNKS, CLIPFT_TILE] relative to tile_max */
} forward_job;

/* A row of the tile in its two parts before and after its pair, which is summed on its own: see clipft_contrastive_forward. */
typedef struct row_parts {
    const float *x;
    int64_t before, skip, after; /* skip: 1 where the pair lies in this tile */
} row_parts;

static row_parts split_row(const forward_job *job, int64_t i)
{
    const clipft_matrix x = job->tile.x;
    const int64_t pair = clipft_tile_pair(job->logits, &job->tile, i);
    const float *row = x.data + i * x.row_stride;
    return pair < 0 ? (row_parts){row, x.cols, 0, 0} : (row_parts){row, pair, 1, x.cols - pair - 1};
}

static void forward_maxima(int64_t begin, int64_t end, void *ctx)
{
    const forward_job *job = ctx;
    const float scale = job->logits->scale;
    for (int64_t i = begin; i < end; ++i) {
        const row_parts row = split_row(job, i);
        job->tile_row_max[i] = fmaxf(clipft_kernel_table.loss.row_max(row.x, row.before, scale),
                                     clipft_kernel_table.loss.row_max(row.x + row.before + row.skip, row.after, scale));
    }
}

static double row_target(const forward_job *job, const float *x, int64_t i)
{
    const clipft_targets *t = job->targets;
    const clipft_tile *tile = &job->tile;
    const int64_t pair = clipft_tile_pair(job->logits, tile, i);
    double target = !t->class_ids && pair >= 0 ? (double)x[pair] : 0.0;
    if (t->class_ids || t->smoothing > 0.0F) {
        static const int32_t none[CLIPFT_TILE]; /* zeros: no column has class -1 */
        const int64_t own = job->logits->row_offset + tile->row0 + i;
        float all = 0.0F;
        const float match =
            t->class_ids ? clipft_kernel_table.loss.row_match_sum(x, tile->x.cols, t->class_ids + tile->col0, t->class_ids[own], &all)
                         : clipft_kernel_table.loss.row_match_sum(x, tile->x.cols, none, -1, &all);
        if (t->class_ids) target = (double)t->class_weight[own] * (double)match;
        target = (1.0 - (double)t->smoothing) * target + (double)t->smoothing / (double)job->logits->text.rows * (double)all;
    }
    return target;
}

static void forward_chunks(int64_t begin, int64_t end, void *ctx)
{
    const forward_job *job = ctx;
    const clipft_matrix x = job->tile.x;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        float *col_sum = job->chunk_col_sum + chunk * CLIPFT_TILE;
        const int64_t row1 = clipft_min(x.rows, (chunk + 1) * CLIPFT_CHUNK);
        memset(col_sum, 0, (size_t)x.cols * sizeof *col_sum);
        for (int64_t i = chunk * CLIPFT_CHUNK; i < row1; ++i) {
            const row_parts row = split_row(job, i);
            const int64_t own = job->tile.row0 + i, rest = row.before + row.skip;
            const float scale = job->logits->scale, max = job->tile_row_max[i], weight = expf(max - job->tile_max);
            double sum = (double)clipft_kernel_table.loss.row_exp_sum(row.x, row.before, scale, max, weight, col_sum);
            sum += (double)clipft_kernel_table.loss.row_exp_sum(row.x + rest, row.after, scale, max, weight, col_sum + rest);
            lse_merge(&job->row_max[own], &job->row_sum[own], max, sum);
            job->row_target[own] += row_target(job, row.x, i);
            if (row.skip) job->pair[own] = (double)scale * (double)row.x[row.before];
        }
    }
}

static void forward_columns(int64_t begin, int64_t end, void *ctx)
{
    const forward_job *job = ctx;
    const clipft_matrix x = job->tile.x;
    const int64_t chunks = (x.rows + CLIPFT_CHUNK - 1) / CLIPFT_CHUNK;
    float max[CLIPFT_CHUNK], sum[CLIPFT_CHUNK];
    for (int64_t block = begin; block < end; ++block) {
        const int64_t col0 = block * CLIPFT_CHUNK, cols = clipft_min(CLIPFT_CHUNK, x.cols - col0);
        bool lost = false;
        for (int64_t j = 0; j < cols; ++j) {
            sum[j] = 0.0F;
            max[j] = job->tile_max;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) sum[j] += job->chunk_col_sum[chunk * CLIPFT_TILE + col0 + j];
            lost |= sum[j] < smallest_col_sum;
        }
        const int64_t pair_row = job->tile.col0 + col0 - job->logits->row_offset - job->tile.row0;
        if (lost) clipft_kernel_table.loss.block_col_lse(x.data + col0, x.rows, cols, x.row_stride, job->logits->scale, pair_row, max, sum);
        for (int64_t j = 0; j < cols; ++j) {
            const int64_t col = job->tile.col0 + col0 + j;
            lse_merge(&job->col_max[col], &job->col_sum[col], max[j], (double)sum[j]);
        }
    }
}

static bool forward_tile(forward_job *job, const clipft_host *host)
{
    const clipft_matrix x = job->tile.x;
    const int64_t chunks = (x.rows + CLIPFT_CHUNK - 1) / CLIPFT_CHUNK;
    const int64_t blocks = (x.cols + CLIPFT_CHUNK - 1) / CLIPFT_CHUNK;
    if (!host->parallel_for(0, x.rows, CLIPFT_CHUNK, forward_maxima, job)) return false;
    job->tile_max = -INFINITY;
    for (int64_t i = 0; i < x.rows; ++i) job->tile_max = fmaxf(job->tile_max, job->tile_row_max[i]);
    return host->parallel_for(0, chunks, 1, forward_chunks, job) && host->parallel_for(0, blocks, 1, forward_columns, job);
}

bool clipft_contrastive_forward(const clipft_logits *logits, const clipft_targets *targets, const clipft_host *host, double *row_lse,
                                double *col_lse, double *target)
{
    const int64_t rows = logits->image.rows, cols = logits->text.rows;
    const int64_t work_items = logits->kept_rows < rows ? CLIPFT_TILE_ITEMS : 0;
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, work_items, sizeof(float));
    clipft_arena_reserve(&arena, rows, sizeof(float));
    clipft_arena_reserve(&arena, cols, sizeof(float));
    clipft_arena_reserve(&arena, rows, sizeof(double));
    clipft_arena_reserve(&arena, rows, sizeof(double));
    clipft_arena_reserve(&arena, CLIPFT_TILE, sizeof(float));
    clipft_arena_reserve(&arena, (int64_t)CLIPFT_CHUNKS * CLIPFT_TILE, sizeof(float));
    if (!clipft_arena_allocate(&arena)) goto done;

    float *work = clipft_arena_take(&arena, work_items, sizeof(float));
    forward_job job = {.logits = logits, .targets = targets, .row_sum = row_lse, .col_sum = col_lse};
    job.row_max = clipft_arena_take(&arena, rows, sizeof(float));
    job.col_max = clipft_arena_take(&arena, cols, sizeof(float));
    job.row_target = clipft_arena_take(&arena, rows, sizeof(double));
    job.pair = clipft_arena_take(&arena, rows, sizeof(double));
    job.tile_row_max = clipft_arena_take(&arena, CLIPFT_TILE, sizeof(float));
    job.chunk_col_sum = clipft_arena_take(&arena, (int64_t)CLIPFT_CHUNKS * CLIPFT_TILE, sizeof(float));
    for (int64_t i = 0; i < rows; ++i) job.row_max[i] = -INFINITY, row_lse[i] = 0.0, job.row_target[i] = 0.0;
    for (int64_t j = 0; j < cols; ++j) job.col_max[j] = -INFINITY, col_lse[j] = 0.0;

    int64_t row0 = 0, col0 = 0;
    bool more = rows > 0;
    for (ok = true; ok && more; more = clipft_tile_next(logits, &row0, &col0))
        ok = clipft_tile_load(logits, host, row0, col0, work, false, &job.tile) && forward_tile(&job, host);

    *target = 0.0;
    for (int64_t i = 0; ok && i < rows; ++i) {
        const int64_t col = logits->row_offset + i;
        const float max = (float)job.pair[i];
        lse_merge(&job.row_max[i], &job.row_sum[i], max, exp(job.pair[i] - (double)max));
        lse_merge(&job.col_max[col], &job.col_sum[col], max, exp(job.pair[i] - (double)max));
        row_lse[i] = (double)job.row_max[i] + log(row_lse[i]);
        *target += (double)logits->scale * job.row_target[i];
    }
    for (int64_t j = 0; ok && j < cols; ++j) col_lse[j] = (double)job.col_max[j] + log(col_lse[j]);
done:
    clipft_arena_free(&arena);
    return ok;
}

/* ---- backward ---- */

typedef struct backward_job {
    const clipft_logits *logits;
    const clipft_targets *targets;
    clipft_tile tile;
    const double *row_lse, *col_lse;
    double gain;      /* grad / 2N */
    double reference; /* R */
    bool wide;
    float *col_lse_f, *col_own; /* [cols] */
    float *col_factor;          /* [CLIPFT_TILE] exp(R - c_j) */
} backward_job;

static void backward_rows(int64_t begin, int64_t end, void *ctx)
{
    const backward_job *job = ctx;
    const clipft_matrix x = job->tile.x;
    const clipft_targets *t = job->targets;
    const clipft_softmax_cols cols = {job->col_lse_f + job->tile.col0, job->col_own + job->tile.col0};
    const double mass = 2.0 * job->gain, smoothing = (double)t->smoothing;
    for (int64_t i = begin; i < end; ++i) {
        const float *row = x.data + i * x.row_stride;
        float *out = job->tile.out.data + i * job->tile.out.row_stride;
        const int64_t pair = clipft_tile_pair(job->logits, &job->tile, i);
        const float pair_product = pair >= 0 ? row[pair] : 0.0F; /* before out overwrites it */
        const double lse = job->row_lse[job->tile.row0 + i];
        const clipft_softmax_row r = {
            .scale = job->logits->scale,
            .lse = (float)lse,
            .own = (float)exp((double)(float)lse - lse),
            .cross = (float)exp((double)(float)lse - job->reference),
            .gain = (float)job->gain,
            .shift = (float)(mass * smoothing / (double)job->logits->text.rows),
        };
        if (job->wide)
            clipft_kernel_table.loss.row_softmax_grad_wide(row, out, x.cols, &r, &cols);
        else
            clipft_kernel_table.loss.row_softmax_grad(row, out, x.cols, &r, job->col_factor);

        const int64_t own = job->logits->row_offset + job->tile.row0 + i;
        const double share = (1.0 - smoothing) * (t->class_ids ? (double)t->class_weight[own] : 1.0);
        if (t->class_ids)
            clipft_kernel_table.loss.row_match_add(out, x.cols, t->class_ids + job->tile.col0, t->class_ids[own], (float)(-mass * share));
        if (pair >= 0) {
            const double logit = (double)job->logits->scale * (double)pair_product;
            const double left = expm1(logit - lse) + expm1(logit - job->col_lse[own]) + 2.0 * (1.0 - share);
            out[pair] = (float)(job->gain * left - (double)r.shift);
        }
    }
}

static bool backward_tile(backward_job *job, const clipft_host *host)
{
    const clipft_matrix x = job->tile.x;
    double smallest = INFINITY;
    job->reference = -INFINITY;
    for (int64_t i = 0; i < x.rows; ++i) job->reference = fmax(job->reference, job->row_lse[job->tile.row0 + i]);
    for (int64_t j = 0; j < x.cols; ++j) smallest = fmin(smallest, job->col_lse[job->tile.col0 + j]);
    job->wide = !(job->reference - smallest <= widest_spread);
    for (int64_t j = 0; !job->wide && j < x.cols; ++j) job->col_factor[j] = (float)exp(job->reference - job->col_lse[job->tile.col0 + j]);
    return host->parallel_for(0, x.rows, CLIPFT_CHUNK, backward_rows, job);
}

bool clipft_contrastive_backward(const clipft_logits *logits, const clipft_targets *targets, const clipft_host *host, const double *row_lse,
                                 const double *col_lse, double grad, clipft_matrix d_image, clipft_matrix d_text, double *d_scale)
{
    const int64_t rows = logits->image.rows, cols = logits->text.rows;
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, CLIPFT_TILE_ITEMS, sizeof(float));
    clipft_arena_reserve(&arena, cols, sizeof(float));
    clipft_arena_reserve(&arena, cols, sizeof(float));
    clipft_arena_reserve(&arena, CLIPFT_TILE, sizeof(float));
    if (!clipft_arena_allocate(&arena)) goto done;

    float *work = clipft_arena_take(&arena, CLIPFT_TILE_ITEMS, sizeof(float));
    backward_job job = {.logits = logits, .targets = targets, .row_lse = row_lse, .col_lse = col_lse, .gain = grad / (2.0 * (double)cols)};
    job.col_lse_f = clipft_arena_take(&arena, cols, sizeof(float));
    job.col_own = clipft_arena_take(&arena, cols, sizeof(float));
    job.col_factor = clipft_arena_take(&arena, CLIPFT_TILE, sizeof(float));
    for (int64_t j = 0; j < cols; ++j) {
        job.col_lse_f[j] = (float)col_lse[j];
        job.col_own[j] = (float)exp((double)job.col_lse_f[j] - col_lse[j]);
    }

    int64_t row0 = 0, col0 = 0;
    bool more = rows > 0;
    for (ok = true; ok && more; more = clipft_tile_next(logits, &row0, &col0)) {
        ok = clipft_tile_load(logits, host, row0, col0, work, true, &job.tile) && backward_tile(&job, host) &&
             clipft_tile_accumulate(logits, host, &job.tile, d_image, d_text);
    }
    if (rows == 0 && d_text.data) memset(d_text.data, 0, (size_t)(d_text.rows * d_text.cols) * sizeof(float));
    ok = ok && clipft_finish_gradients(logits, host, d_image, d_text, d_scale);
done:
    clipft_arena_free(&arena);
    return ok;
}
