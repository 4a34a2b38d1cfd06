/* Heads shared out among threads, each packed and then given to the micro-kernel. */
#include "attention.h"

#include "../common/arena.h"
#include "../common/gemm.h"
#include "../common/sizes.h"
#include "../table.h"

#include <stdatomic.h>
#include <string.h>

enum { COLS = CLIPFT_ATTEND_COLS };

/* What a worker needs for a head. */
typedef struct workspace {
    float *keys, *values, *scores; /* see clipft_attend */
    float *rows, *out;             /* [length, dim], [queries, dim] of what is not read or written in place */
} workspace;

typedef struct attention_job {
    const clipft_attention *a;
    workspace *spaces; /* [workers] */
    int64_t workers;
    atomic_llong next;
} attention_job;

/* Rows of a head's queries (part 0), keys (1) or values (2): in place, or converted. */
static clipft_matrix head_rows(const clipft_attention *a, int64_t batch, int64_t head, int64_t part, int64_t rows, float *copy)
{
    const int64_t row = batch * a->length, col = (part * a->heads + head) * a->dim;
    if (clipft_view_plain(&a->qkv)) return (clipft_matrix){clipft_view_floats(&a->qkv, row, col), rows, a->dim, a->qkv.row_stride, 1};
    for (int64_t i = 0; i < rows; ++i) clipft_view_read(&a->qkv, row + i, col, a->dim, copy + i * a->dim);
    return (clipft_matrix){copy, rows, a->dim, a->dim, 1};
}

static void pack_keys(clipft_matrix k, float *keys)
{
    for (int64_t i = 0; i < k.rows; i += COLS, keys += COLS * k.cols)
        clipft_gemm_pack(COLS, clipft_rows(k, i, clipft_min(i + COLS, k.rows)), keys);
}

static void pack_values(clipft_matrix v, float *values)
{
    for (int64_t j = 0; j < v.cols; j += COLS) {
        const int64_t n = clipft_min(COLS, v.cols - j);
        for (int64_t i = 0; i < v.rows; ++i, values += COLS) {
            memcpy(values, v.data + i * v.row_stride + j, (size_t)n * sizeof *values);
            if (n < COLS) memset(values + n, 0, (size_t)(COLS - n) * sizeof *values);
        }
    }
}

static void run_head(const clipft_attention *a, const workspace *own, int64_t batch, int64_t head)
{
    const bool plain = clipft_view_plain(&a->out);
    const int64_t row = batch * a->queries, col = head * a->dim;
    pack_keys(head_rows(a, batch, head, 1, a->length, own->rows), own->keys);
    pack_values(head_rows(a, batch, head, 2, a->length, own->rows), own->values);
    const clipft_matrix q = head_rows(a, batch, head, 0, a->queries, own->rows);
    const clipft_attend task = {.q = q.data,
                                .keys = own->keys,
                                .values = own->values,
                                .scores = own->scores,
                                .out = plain ? clipft_view_floats(&a->out, row, col) : own->out,
                                .q_stride = q.row_stride,
                                .out_stride = plain ? a->out.row_stride : a->dim,
                                .rows = a->queries,
                                .dim = a->dim,
                                .length = a->length,
                                .scale = a->scale,
                                .causal = a->causal};
    clipft_kernel_table.attention.attend(&task);
    for (int64_t i = 0; !plain && i < a->queries; ++i) clipft_view_write(&a->out, row + i, col, a->dim, own->out + i * a->dim);
}

static void run_heads(int64_t begin, int64_t end, void *ctx)
{
    (void)end; /* whoever comes takes the next head, so that none waits for a slower one */
    attention_job *job = ctx;
    const clipft_attention *a = job->a;
    for (int64_t index; (index = atomic_fetch_add(&job->next, 1)) < a->batch * a->heads;)
        run_head(a, &job->spaces[begin], index / a->heads, index % a->heads);
}

/* Claims every piece: called before `arena` is allocated and once more after. */
static void claim_all(attention_job *job, clipft_arena *arena)
{
    const clipft_attention *a = job->a;
    const int64_t length = clipft_round_up(a->length, COLS), dim = clipft_round_up(a->dim, COLS);
    workspace *spaces = clipft_arena_claim(arena, job->workers, sizeof *spaces);
    for (int64_t worker = 0; worker < job->workers; ++worker) {
        const int64_t in = clipft_view_plain(&a->qkv) ? 0 : a->length * a->dim, out = clipft_view_plain(&a->out) ? 0 : a->queries * a->dim;
        const workspace w = {.keys = clipft_arena_claim(arena, length * dim, sizeof(float)),
                             .values = clipft_arena_claim(arena, length * dim, sizeof(float)),
                             .scores = clipft_arena_claim(arena, length * CLIPFT_ATTEND_ROWS, sizeof(float)),
                             .rows = clipft_arena_claim(arena, in, sizeof(float)),
                             .out = clipft_arena_claim(arena, out, sizeof(float))};
        if (spaces) spaces[worker] = w;
    }
    job->spaces = spaces;
}

bool clipft_attention_run(const clipft_attention *a, const clipft_host *host)
{
    attention_job job = {.a = a};
    clipft_arena arena = {0};
    bool ok = false;
    if (a->batch * a->queries == 0) return true;
    job.workers = clipft_min(host->threads(), a->batch * a->heads);
    claim_all(&job, &arena);
    if (!clipft_arena_allocate(&arena)) goto done;
    claim_all(&job, &arena);
    ok = host->parallel_for(0, job.workers, 1, run_heads, &job);
done:
    clipft_arena_free(&arena);
    return ok;
}
