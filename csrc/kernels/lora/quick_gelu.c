/* quick_gelu, x sigmoid(1.702 x), and its derivative: one pass each. */
#include "../common/sizes.h"
#include "../table.h"
#include "lora.h"

enum { PIECE = 1024, GRAIN = 8192 };

typedef struct gelu_job {
    const clipft_view *x, *dy, *out; /* dy NULL in the forward pass */
} gelu_job;

static void gelu_rows(int64_t begin, int64_t end, void *ctx)
{
    const gelu_job *job = ctx;
    const bool plain = clipft_view_plain(job->x) && clipft_view_plain(job->out) && (!job->dy || clipft_view_plain(job->dy));
    const int64_t piece = plain ? job->x->cols : PIECE;
    float x_copy[PIECE], dy_copy[PIECE];
    for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < job->x->cols; j += piece) {
            const int64_t n = clipft_min(piece, job->x->cols - j);
            const float *x = plain ? clipft_view_floats(job->x, i, j) : x_copy;
            const float *dy = plain && job->dy ? clipft_view_floats(job->dy, i, j) : dy_copy;
            float *out = plain ? clipft_view_floats(job->out, i, j) : x_copy;
            if (!plain) clipft_view_read(job->x, i, j, n, x_copy);
            if (!plain && job->dy) clipft_view_read(job->dy, i, j, n, dy_copy);
            if (job->dy)
                clipft_kernel_table.lora.row_quick_gelu_grad(x, dy, out, n);
            else
                clipft_kernel_table.lora.row_quick_gelu(x, out, n);
            if (!plain) clipft_view_write(job->out, i, j, n, x_copy);
        }
}

static bool run(const clipft_host *host, gelu_job *job)
{
    const int64_t cols = job->x->cols;
    return cols == 0 || host->parallel_for(0, job->x->rows, GRAIN / cols + 1, gelu_rows, job);
}

bool clipft_quick_gelu(const clipft_host *host, const clipft_view *x, const clipft_view *y)
{
    gelu_job job = {x, NULL, y};
    return run(host, &job);
}

bool clipft_quick_gelu_backward(const clipft_host *host, const clipft_view *dy, const clipft_view *x, const clipft_view *dx)
{
    gelu_job job = {x, dy, dx};
    return run(host, &job);
}
