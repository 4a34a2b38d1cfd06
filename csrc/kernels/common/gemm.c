#include "gemm.h"

#include "../table.h"
#include "arena.h"
#include "sizes.h"

#include <string.h>

enum { TASK_ROWS = 16 };

typedef float four __attribute__((vector_size(16)));

#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else /* gcc before 12 has no other */
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){i, j, k, l})
#endif

static inline four load_four(const float *p)
{
    four v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* to[k * width + i] = from[i * stride + k] for i, k < 4. */
static inline void transpose_four(const float *from, int64_t stride, float *to, int64_t width)
{
    const four a = load_four(from), b = load_four(from + stride), c = load_four(from + 2 * stride), d = load_four(from + 3 * stride);
    const four ab0 = SHUFFLE(a, b, 0, 4, 1, 5), ab1 = SHUFFLE(a, b, 2, 6, 3, 7);
    const four cd0 = SHUFFLE(c, d, 0, 4, 1, 5), cd1 = SHUFFLE(c, d, 2, 6, 3, 7);
    const four rows[4] = {SHUFFLE(ab0, cd0, 0, 1, 4, 5), SHUFFLE(ab0, cd0, 2, 3, 6, 7), SHUFFLE(ab1, cd1, 0, 1, 4, 5),
                          SHUFFLE(ab1, cd1, 2, 3, 6, 7)};
    for (int k = 0; k < 4; ++k) memcpy(to + k * width, &rows[k], sizeof rows[k]);
}

/* Rows of m that lie along its columns: 4 x 4 at a time, what is left one by one. */
static void pack_transposed(int64_t width, clipft_matrix m, float *to)
{
    const int64_t rows = m.col_stride == 1 ? m.rows / 4 * 4 : 0, cols = m.cols / 4 * 4;
    for (int64_t k = 0; k < cols; k += 4)
        for (int64_t i = 0; i < rows; i += 4) transpose_four(m.data + i * m.row_stride + k, m.row_stride, to + k * width + i, width);
    for (int64_t i = 0; i < m.rows; ++i)
        for (int64_t k = i < rows ? cols : 0; k < m.cols; ++k) to[k * width + i] = m.data[i * m.row_stride + k * m.col_stride];
}

/* Rows of m that lie across its columns. Not memcpy of a whole column: its call costs more than the copy. */
static void pack_columns(int64_t width, clipft_matrix m, float *to)
{
    for (int64_t k = 0; k < m.cols; ++k, to += width) {
        const float *from = m.data + k * m.col_stride;
        int64_t i = 0;
        for (; i + 4 <= m.rows; i += 4) memcpy(to + i, from + i, 4 * sizeof *to);
        for (; i < m.rows; ++i) to[i] = from[i];
    }
}

void clipft_gemm_pack(int64_t width, clipft_matrix m, float *to)
{
    if (m.rows < width) memset(to, 0, (size_t)(m.cols * width) * sizeof *to);
    (m.row_stride == 1 ? pack_columns : pack_transposed)(width, m, to);
}

typedef struct gemm_job {
    clipft_matrix b; /* the block: [depth, cols] */
    float *packed;
    clipft_gemm_block block;
} gemm_job;

static void pack_panels(int64_t begin, int64_t end, void *ctx)
{
    const gemm_job *job = ctx;
    const clipft_matrix b = job->b;
    for (int64_t panel = begin; panel < end; ++panel) {
        float *to = job->packed + panel * CLIPFT_GEMM_PANEL * b.rows;
        const int64_t col = panel * CLIPFT_GEMM_PANEL, cols = clipft_min(CLIPFT_GEMM_PANEL, b.cols - col);
        clipft_gemm_pack(CLIPFT_GEMM_PANEL, clipft_rows(clipft_transposed(b), col, col + cols), to);
    }
}

static void multiply_rows(int64_t begin, int64_t end, void *ctx)
{
    const gemm_job *job = ctx;
    clipft_kernel_table.gemm.multiply(&job->block, begin, end);
}

bool clipft_gemm(const clipft_host *host, clipft_matrix c, clipft_matrix a, clipft_matrix b, bool accumulate)
{
    const int64_t panels = clipft_divide_up(c.cols, CLIPFT_GEMM_PANEL), deepest = clipft_min(CLIPFT_GEMM_DEPTH, a.cols);
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, panels * deepest * CLIPFT_GEMM_PANEL, sizeof(float));
    if (!clipft_arena_allocate(&arena)) goto done;

    gemm_job job = {.packed = clipft_arena_take(&arena, panels * deepest * CLIPFT_GEMM_PANEL, sizeof(float))};
    ok = true;
    for (int64_t k = 0; ok && k < a.cols; k += deepest) {
        const int64_t depth = clipft_min(deepest, a.cols - k);
        job.b = clipft_rows(b, k, k + depth);
        job.block = (clipft_gemm_block){.c = c,
                                        .a = {a.data + k * a.col_stride, a.rows, depth, a.row_stride, a.col_stride},
                                        .b = job.packed,
                                        .accumulate = accumulate || k > 0};
        ok = host->parallel_for(0, panels, 1, pack_panels, &job) && host->parallel_for(0, c.rows, TASK_ROWS, multiply_rows, &job);
    }
done:
    clipft_arena_free(&arena);
    return ok;
}
