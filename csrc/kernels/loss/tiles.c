#include "tiles.h"

bool clipft_tile_load(const clipft_logits *logits, const clipft_host *host, int64_t row0, int64_t col0, float *work, bool reuse,
                      clipft_tile *tile)
{
    const int64_t rows = clipft_min(CLIPFT_TILE, logits->image.rows - row0);
    const int64_t cols = clipft_min(CLIPFT_TILE, logits->text.rows - col0);
    const bool kept = row0 < logits->kept_rows;
    const int64_t stride = kept ? logits->text.rows : CLIPFT_TILE_STRIDE;
    float *data = kept ? logits->kept + row0 * stride + col0 : work;

    *tile = (clipft_tile){{data, rows, cols, stride, 1}, {work, rows, cols, CLIPFT_TILE_STRIDE, 1}, row0, col0};
    if (kept && reuse) return true;
    return host->gemm(tile->x, clipft_rows(logits->image, row0, row0 + rows),
                      clipft_transposed(clipft_rows(logits->text, col0, col0 + cols)), false);
}

bool clipft_tile_accumulate(const clipft_logits *logits, const clipft_host *host, const clipft_tile *tile, clipft_matrix d_image,
                            clipft_matrix d_text)
{
    const int64_t row0 = tile->row0, row1 = row0 + tile->out.rows, col0 = tile->col0, col1 = col0 + tile->out.cols;
    bool ok = true;
    if (d_image.data) ok = host->gemm(clipft_rows(d_image, row0, row1), tile->out, clipft_rows(logits->text, col0, col1), col0 > 0);
    if (ok && d_text.data)
        ok = host->gemm(clipft_rows(d_text, col0, col1), clipft_transposed(tile->out), clipft_rows(logits->image, row0, row1), row0 > 0);
    return ok;
}

typedef struct finish_job {
    clipft_matrix grad, value;
    float scale;
    double *dots; /* [rows] <grad, value> before scaling */
} finish_job;

static void finish_rows(int64_t begin, int64_t end, void *ctx)
{
    const finish_job *job = ctx;
    for (int64_t i = begin; i < end; ++i) {
        float *g = job->grad.data + i * job->grad.row_stride;
        const float *v = job->value.data + i * job->value.row_stride;
        double dot[4] = {0.0}; /* four chains hide the latency of one */
        for (int64_t k = 0; k < job->grad.cols; ++k) {
            dot[k % 4] += (double)g[k] * (double)v[k];
            g[k] *= job->scale;
        }
        job->dots[i] = dot[0] + dot[1] + dot[2] + dot[3];
    }
}

bool clipft_finish_gradients(const clipft_logits *logits, const clipft_host *host, clipft_matrix d_image, clipft_matrix d_text,
                             double *d_scale)
{
    finish_job image = {d_image, logits->image, logits->scale, NULL}, text = {d_text, logits->text, logits->scale, NULL};
    const finish_job *job = d_image.data ? &image : &text;
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, d_image.rows, sizeof(double));
    clipft_arena_reserve(&arena, d_text.rows, sizeof(double));
    if (!clipft_arena_allocate(&arena)) goto done;

    image.dots = clipft_arena_take(&arena, d_image.rows, sizeof(double));
    text.dots = clipft_arena_take(&arena, d_text.rows, sizeof(double));
    ok = (!d_image.data || host->parallel_for(0, d_image.rows, CLIPFT_CHUNK, finish_rows, &image)) &&
         (!d_text.data || host->parallel_for(0, d_text.rows, CLIPFT_CHUNK, finish_rows, &text));
    *d_scale = 0.0;
    for (int64_t i = 0; ok && i < job->grad.rows; ++i) *d_scale += job->dots[i];
done:
    clipft_arena_free(&arena);
    return ok;
}
