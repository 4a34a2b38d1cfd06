/* Heads shared out among threads, each packed and then given to the micro-kernel. */
#include "attention.h"

#include "../common/arena.h"
#include "../common/gemm.h"
#include "../common/sizes.h"
#include "../table.h"

#include <stdatomic.h>
#include <string.h>

enum { COLS = CLIPFT_ATTEND_COLS };

/* One head of a matrix of all: [rows, dim], of `rows` a picture. */
static clipft_view head_view(const clipft_attention *a, clipft_view all, int64_t rows, int64_t index)
{
    const int64_t batch = index / a->heads, col = index % a->heads * a->dim;
    const clipft_view own = clipft_view_rows(all, batch * rows, (batch + 1) * rows);
    return clipft_view_transposed(clipft_view_rows(clipft_view_transposed(own), col, col + a->dim));
}

/* Heads shared out: whoever comes takes the next, so that none waits for a slower one. */
typedef struct head_tasks {
    const clipft_attention *a;
    int64_t workers;
    atomic_llong next;
} head_tasks;

static bool next_head(head_tasks *tasks, int64_t *index)
{
    *index = atomic_fetch_add(&tasks->next, 1);
    return *index < tasks->a->batch * tasks->a->heads;
}

static void pack_keys(clipft_matrix k, float *keys)
{
    for (int64_t i = 0; i < k.rows; i += COLS, keys += COLS * k.cols)
        clipft_gemm_pack(COLS, clipft_rows(k, i, clipft_min(i + COLS, k.rows)), keys);
}

/* ---- forward ---- */

/* What a worker needs for a head. */
typedef struct workspace {
    float *keys, *values, *scores; /* see clipft_attend */
    float *rows, *out;             /* [most rows, dim], [queries, dim] of what is not read or written in place */
} workspace;

typedef struct attention_job {
    head_tasks tasks;
    const clipft_view *out;
    workspace *spaces; /* [workers] */
} attention_job;

/* In place, or converted. */
static clipft_matrix head_rows(clipft_view head, float *copy)
{
    if (clipft_view_plain(&head)) return (clipft_matrix){head.data, head.rows, head.cols, head.row_stride, 1};
    clipft_view_pack(&head, copy, head.cols);
    return (clipft_matrix){copy, head.rows, head.cols, head.cols, 1};
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

static void run_head(const clipft_attention *a, const clipft_view *out, const workspace *own, int64_t index)
{
    const clipft_view to = head_view(a, *out, a->queries, index);
    const bool plain = clipft_view_plain(&to);
    pack_keys(head_rows(head_view(a, a->key, a->length, index), own->rows), own->keys);
    pack_values(head_rows(head_view(a, a->value, a->length, index), own->rows), own->values);
    const clipft_matrix q = head_rows(head_view(a, a->query, a->queries, index), own->rows);
    const clipft_attend task = {.q = q.data,
                                .keys = own->keys,
                                .values = own->values,
                                .scores = own->scores,
                                .out = plain ? to.data : own->out,
                                .q_stride = q.row_stride,
                                .out_stride = plain ? to.row_stride : a->dim,
                                .rows = a->queries,
                                .dim = a->dim,
                                .length = a->length,
                                .scale = a->scale,
                                .causal = a->causal};
    clipft_kernel_table.attention.attend(&task);
    for (int64_t i = 0; !plain && i < a->queries; ++i) clipft_view_write(&to, i, 0, a->dim, own->out + i * a->dim);
}

static void run_heads(int64_t begin, int64_t end, void *ctx)
{
    (void)end;
    attention_job *job = ctx;
    for (int64_t index; next_head(&job->tasks, &index);) run_head(job->tasks.a, job->out, &job->spaces[begin], index);
}

/* Claims every piece: called before `arena` is allocated and once more after. */
static void claim_all(attention_job *job, clipft_arena *arena)
{
    const clipft_attention *a = job->tasks.a;
    const bool copies = !clipft_view_plain(&a->query) || !clipft_view_plain(&a->key) || !clipft_view_plain(&a->value);
    const int64_t length = clipft_round_up(a->length, COLS), dim = clipft_round_up(a->dim, COLS);
    const int64_t rows = a->length > a->queries ? a->length : a->queries;
    workspace *spaces = clipft_arena_claim(arena, job->tasks.workers, sizeof *spaces);
    for (int64_t worker = 0; worker < job->tasks.workers; ++worker) {
        const workspace w = {.keys = clipft_arena_claim(arena, length * dim, sizeof(float)),
                             .values = clipft_arena_claim(arena, length * dim, sizeof(float)),
                             .scores = clipft_arena_claim(arena, length * CLIPFT_ATTEND_ROWS, sizeof(float)),
                             .rows = clipft_arena_claim(arena, copies ? rows * a->dim : 0, sizeof(float)),
                             .out = clipft_arena_claim(arena, clipft_view_plain(job->out) ? 0 : a->queries * a->dim, sizeof(float))};
        if (spaces) spaces[worker] = w;
    }
    job->spaces = spaces;
}

bool clipft_attention_run(const clipft_attention *a, const clipft_view *out, const clipft_host *host)
{
    attention_job job = {.tasks.a = a, .tasks.workers = clipft_min(host->threads(), a->batch * a->heads), .out = out};
    clipft_arena arena = {0};
    bool ok = false;
    if (a->batch * a->queries == 0) return true;
    claim_all(&job, &arena);
    if (!clipft_arena_allocate(&arena)) goto done;
    claim_all(&job, &arena);
    ok = host->parallel_for(0, job.tasks.workers, 1, run_heads, &job);
done:
    clipft_arena_free(&arena);
    return ok;
}

/* ---- backward ---- */

typedef struct grad_space {
    float *q, *grad, *keys, *keys_t, *values_t, *p, *ds, *dq, *dk, *dv; /* see clipft_attend_grad */
} grad_space;

typedef struct grad_job {
    head_tasks tasks;
    const clipft_view *grad;
    const clipft_attention_grads *grads;
    grad_space *spaces; /* [workers] */
} grad_job;

/* Room for tiles that end beyond the last key. */
static int64_t key_rows(const clipft_attention *a) { return a->length + CLIPFT_ATTEND_ROWS; }
static int64_t row_width(const clipft_attention *a) { return clipft_round_up(a->dim, CLIPFT_ATTEND_PANEL); }

/* Asks for the lines that a head is going to be written to, which lie a row of all heads apart: beside the work on it they come for
 * nothing, and cost a sixth of the time of 50 tokens where each store waits for its own. */
static void expect_head(const clipft_view *to)
{
    enum { LINE = 16 };
    for (int64_t i = 0; clipft_view_plain(to) && i < to->rows; ++i)
        for (int64_t j = 0; j < to->cols; j += LINE) __builtin_prefetch(clipft_view_floats(to, i, j), 1, 2);
}

static void write_head(const float *from, int64_t stride, const clipft_view *to)
{
    for (int64_t i = 0; i < to->rows; ++i) clipft_view_write(to, i, 0, to->cols, from + i * stride);
}

static void grad_head(const grad_job *job, const grad_space *own, int64_t index)
{
    const clipft_attention *a = job->tasks.a;
    const int64_t width = row_width(a);
    const clipft_attend_grad task = {.q = own->q,
                                     .grad = own->grad,
                                     .keys = own->keys,
                                     .keys_t = own->keys_t,
                                     .values_t = own->values_t,
                                     .p = own->p,
                                     .ds = own->ds,
                                     .dq = own->dq,
                                     .dk = own->dk,
                                     .dv = own->dv,
                                     .rows = a->queries,
                                     .dim = a->dim,
                                     .length = a->length,
                                     .width = width,
                                     .stride = clipft_round_up(key_rows(a), COLS),
                                     .scale = a->scale,
                                     .causal = a->causal};
    const clipft_view q = head_view(a, a->query, a->queries, index), k = head_view(a, a->key, a->length, index);
    const clipft_view v = head_view(a, a->value, a->length, index), grad = head_view(a, *job->grad, a->queries, index);
    const clipft_view dq = head_view(a, job->grads->query, a->queries, index), dk = head_view(a, job->grads->key, a->length, index);
    const clipft_view dv = head_view(a, job->grads->value, a->length, index);
    clipft_view_pack(&v, own->keys, width); /* until the keys come */
    pack_keys((clipft_matrix){own->keys, a->length, a->dim, width, 1}, own->values_t);
    clipft_view_pack(&k, own->keys, width);
    pack_keys((clipft_matrix){own->keys, a->length, a->dim, width, 1}, own->keys_t);
    clipft_view_pack(&q, own->q, width);
    clipft_view_pack(&grad, own->grad, width);
    expect_head(&dq);
    expect_head(&dk);
    expect_head(&dv);
    memset(own->dk, 0, (size_t)(key_rows(a) * width) * sizeof(float));
    memset(own->dv, 0, (size_t)(key_rows(a) * width) * sizeof(float));
    clipft_kernel_table.attention.attend_grad(&task);
    write_head(own->dq, width, &dq);
    write_head(own->dk, width, &dk);
    write_head(own->dv, width, &dv);
}

static void grad_heads(int64_t begin, int64_t end, void *ctx)
{
    (void)end;
    grad_job *job = ctx;
    for (int64_t index; next_head(&job->tasks, &index);) grad_head(job, &job->spaces[begin], index);
}

static void claim_grads(grad_job *job, clipft_arena *arena)
{
    const clipft_attention *a = job->tasks.a;
    const int64_t width = row_width(a), packed = clipft_round_up(a->length, COLS) * a->dim;
    const int64_t scores = CLIPFT_ATTEND_BLOCK * clipft_round_up(key_rows(a), COLS);
    grad_space *spaces = clipft_arena_claim(arena, job->tasks.workers, sizeof *spaces);
    for (int64_t worker = 0; worker < job->tasks.workers; ++worker) {
        const grad_space w = {.q = clipft_arena_claim(arena, a->queries * width, sizeof(float)),
                              .grad = clipft_arena_claim(arena, a->queries * width, sizeof(float)),
                              .keys = clipft_arena_claim(arena, a->length * width, sizeof(float)),
                              .keys_t = clipft_arena_claim(arena, packed, sizeof(float)),
                              .values_t = clipft_arena_claim(arena, packed, sizeof(float)),
                              .p = clipft_arena_claim(arena, scores, sizeof(float)),
                              .ds = clipft_arena_claim(arena, scores, sizeof(float)),
                              .dq = clipft_arena_claim(arena, a->queries * width, sizeof(float)),
                              .dk = clipft_arena_claim(arena, key_rows(a) * width, sizeof(float)),
                              .dv = clipft_arena_claim(arena, key_rows(a) * width, sizeof(float))};
        if (spaces) spaces[worker] = w;
    }
    job->spaces = spaces;
}

bool clipft_attention_grad(const clipft_attention *a, const clipft_view *grad, const clipft_attention_grads *grads, const clipft_host *host)
{
    grad_job job = {.tasks.a = a, .tasks.workers = clipft_min(host->threads(), a->batch * a->heads), .grad = grad, .grads = grads};
    clipft_arena arena = {0};
    bool ok = false;
    if (a->batch * a->length == 0) return true;
    claim_grads(&job, &arena);
    if (!clipft_arena_allocate(&arena)) goto done;
    claim_grads(&job, &arena);
    ok = host->parallel_for(0, job.tasks.workers, 1, grad_heads, &job);
done:
    clipft_arena_free(&arena);
    return ok;
}
