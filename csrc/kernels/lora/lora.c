/* The passes of lora.h: blocks of ROWS x COLS are brought into float32 in the L1 cache, and every product that needs them is taken there,
 * so that x, dy, y and dx each pass through memory once. */
#include "lora.h"

#include "../common/arena.h"
#include "../common/sizes.h"
#include "../table.h"

#include <string.h>

/* A block. Its rows lie STRIDE apart: a multiple of a page's size would put a column's elements into the same few places of the cache. */
enum { ROWS = 24, COLS = 256, STRIDE = COLS + 16, PAGE = 4096 / sizeof(float), PARTS = 32 };

typedef float lora_block[ROWS * STRIDE] __attribute__((aligned(64)));
typedef int32_t lora_mask[ROWS * STRIDE] __attribute__((aligned(64)));

int64_t clipft_lora_padded(int64_t rank) { return clipft_round_up(rank, CLIPFT_RANK_PAD); }

/* ---- dropout ---- */

static uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return z ^ z >> 31;
}

clipft_dropout clipft_dropout_make(double p, int64_t seed)
{
    const double dropped = p * 4294967296.0 + 0.5; /* hashes below this are dropped */
    const int64_t count = dropped < 4294967295.0 ? (int64_t)dropped : 4294967295;
    return (clipft_dropout){mix((uint64_t)seed), (int32_t)(count - 2147483648LL), p > 0.0};
}

clipft_dropout_row clipft_dropout_at(const clipft_dropout *dropout, int64_t row, int64_t col)
{
    const uint64_t key = mix(dropout->seed + (uint64_t)row * 0x9e3779b97f4a7c15ULL);
    return (clipft_dropout_row){(uint32_t)key, (uint32_t)(key >> 32), (uint32_t)col, dropout->threshold};
}

typedef struct mask_job {
    const clipft_dropout *dropout;
    float *mask;
    int64_t cols;
} mask_job;

static void mask_rows(int64_t begin, int64_t end, void *ctx)
{
    const mask_job *job = ctx;
    int32_t kept[COLS];
    for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < job->cols; j += COLS) {
            float *out = job->mask + i * job->cols + j;
            const int64_t n = clipft_min(COLS, job->cols - j);
            const clipft_dropout_row row = clipft_dropout_at(job->dropout, i, j);
            for (int64_t k = 0; k < n; ++k) out[k] = 1.0F;
            if (job->dropout->active) clipft_kernel_table.lora.row_dropout(&row, out, out, kept, n);
        }
}

bool clipft_dropout_mask(const clipft_dropout *dropout, const clipft_host *host, float *mask, int64_t rows, int64_t cols)
{
    mask_job job = {dropout, mask, cols};
    return cols == 0 || host->parallel_for(0, rows, ROWS, mask_rows, &job);
}

/* ---- blocks ---- */

typedef struct block_range {
    int64_t row, rows, col, cols;
} block_range;

/* Rows of a block, `stride` apart. */
typedef struct block_rows {
    const float *data;
    int64_t stride;
} block_rows;

/* Brings a block of m into `block`, zeros up to a multiple of the rank's pad, which is one of every vector width. */
static block_rows load_block(const clipft_view *m, const block_range *at, float *block)
{
    const size_t rest = (size_t)(clipft_round_up(at->cols, CLIPFT_RANK_PAD) - at->cols) * sizeof(float);
    for (int64_t i = 0; i < at->rows; ++i) {
        clipft_view_read(m, at->row + i, at->col, at->cols, block + i * STRIDE);
        memset(block + i * STRIDE + at->cols, 0, rest);
    }
    return (block_rows){block, STRIDE};
}

/* A block of m where it lies, or, where it lacks the pad, in `copy`. */
static block_rows block_of(const clipft_view *m, const block_range *at, float *copy)
{
    if (!clipft_view_plain(m) || at->cols % CLIPFT_RANK_PAD != 0) return load_block(m, at, copy);
    return (block_rows){clipft_view_floats(m, at->row, at->col), m->row_stride};
}

/* The block of m after `at`, along the row and then down, where it is whole and of float32. */
static clipft_ahead block_ahead(const clipft_view *m, const block_range *at)
{
    const bool last = at->col + at->cols >= m->cols;
    const int64_t row = at->row + (last ? at->rows : 0), col = last ? 0 : at->col + at->cols;
    if (!clipft_view_plain(m) || row + at->rows > m->rows || col + at->cols > m->cols) return (clipft_ahead){NULL, 0};
    return (clipft_ahead){clipft_view_floats(m, row, col), m->row_stride};
}

static block_rows activate_block(const clipft_view *activated, const block_range *at, block_rows in, float *out)
{
    const int64_t cols = clipft_round_up(at->cols, CLIPFT_RANK_PAD); /* quick_gelu(0) = 0: the pad stays zero */
    for (int64_t i = 0; i < at->rows; ++i) {
        clipft_kernel_table.lora.row_quick_gelu(in.data + i * in.stride, out + i * STRIDE, cols);
        if (activated && activated->data) clipft_view_write(activated, at->row + i, at->col, at->cols, out + i * STRIDE);
    }
    return (block_rows){out, STRIDE};
}

static void drop_block(const clipft_dropout *dropout, const block_range *at, block_rows in, float *out, int32_t *mask)
{
    const int64_t cols = clipft_round_up(at->cols, CLIPFT_RANK_PAD); /* the pad stays zero */
    for (int64_t i = 0; i < at->rows; ++i) {
        const clipft_dropout_row row = clipft_dropout_at(dropout, at->row + i, at->col);
        clipft_kernel_table.lora.row_dropout(&row, in.data + i * in.stride, out + i * STRIDE, mask + i * STRIDE, cols);
    }
}

/* A block of m . act(x) in `out`. What comes back is that of x, in place or in `copy`, which may be `out`. */
static block_rows prepare_block(const clipft_lora *lora, const clipft_view *x, const clipft_view *activated, const block_range *at,
                                float *copy, float *out, int32_t *mask)
{
    if (!lora->quick_gelu && !lora->dropout.active) return load_block(x, at, out);
    const block_rows raw = block_of(x, at, copy);
    const block_rows active = lora->quick_gelu ? activate_block(activated, at, raw, out) : raw;
    if (lora->dropout.active) drop_block(&lora->dropout, at, active, out, mask);
    return raw;
}

/* Packed operands: [n, padded] for products into the rank, [rank, clipft_round_up(n)] for products out of it. */
void clipft_lora_pack(clipft_view m, float scale, float *panel, int64_t stride)
{
    clipft_view_pack(&m, panel, stride);
    for (int64_t k = 0; scale != 1.0F && k < m.rows * stride; ++k) panel[k] *= scale;
}

/* ---- v = m . act(x) A^T ---- */

typedef struct down_job {
    const clipft_lora *lora;
    const clipft_view *x, *activated;
    float *panel; /* [in, padded] */
    float *v;
    int64_t padded;
} down_job;

static void down_rows(int64_t begin, int64_t end, void *ctx)
{
    const down_job *job = ctx;
    lora_block block;
    lora_mask mask;
    for (int64_t row = begin; row < end; row += ROWS) {
        block_range at = {row, clipft_min(ROWS, end - row), 0, 0};
        float *v = job->v + row * job->padded;
        memset(v, 0, (size_t)(at.rows * job->padded) * sizeof *v);
        for (; at.col < job->x->cols; at.col += COLS) {
            at.cols = clipft_min(COLS, job->x->cols - at.col);
            prepare_block(job->lora, job->x, job->activated, &at, block, block, mask);
            clipft_kernel_table.lora.rank_down(block, STRIDE, at.rows, at.cols, job->panel + at.col * job->padded, job->padded, v,
                                               block_ahead(job->x, &at));
        }
    }
}

bool clipft_lora_down(const clipft_lora *lora, const clipft_host *host, const clipft_view *x, const clipft_view *activated, float *v)
{
    const int64_t padded = clipft_lora_padded(lora->lora_a.rows);
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, x->cols * padded, sizeof(float));
    if (clipft_arena_allocate(&arena)) {
        down_job job = {lora, x, activated, clipft_arena_take(&arena, x->cols * padded, sizeof(float)), v, padded};
        clipft_lora_pack(clipft_view_transposed(lora->lora_a), 1.0F, job.panel, padded);
        ok = host->parallel_for(0, x->rows, ROWS, down_rows, &job);
    }
    clipft_arena_free(&arena);
    return ok;
}

/* ---- y (+)= b + s v B^T ---- */

typedef struct up_job {
    const clipft_view *y;
    const float *v;
    float *panel; /* [rank, stride] */
    float *bias;  /* [stride] or NULL: add to y */
    int64_t rank, padded, stride;
} up_job;

static void up_block(const up_job *job, const block_range *at, float *block)
{
    const bool plain = clipft_view_plain(job->y);
    float *out = plain ? clipft_view_floats(job->y, at->row, at->col) : block;
    const int64_t stride = plain ? job->y->row_stride : STRIDE;
    const clipft_rank_tile tile = {.v = job->v + at->row * job->padded,
                                   .panel = job->panel + at->col,
                                   .init = job->bias ? job->bias + at->col : out,
                                   .out = out,
                                   .rows = at->rows,
                                   .cols = at->cols,
                                   .rank = job->rank,
                                   .padded = job->padded,
                                   .panel_stride = job->stride,
                                   .init_stride = job->bias ? 0 : stride,
                                   .out_stride = stride};
    if (!plain && !job->bias) load_block(job->y, at, block);
    clipft_kernel_table.lora.rank_up(&tile);
    for (int64_t i = 0; !plain && i < at->rows; ++i) clipft_view_write(job->y, at->row + i, at->col, at->cols, block + i * STRIDE);
}

/* Columns outside, so that a block of the panel stays in the L1 cache for a few blocks of rows. */
static void up_rows(int64_t begin, int64_t end, void *ctx)
{
    const up_job *job = ctx;
    lora_block block;
    for (int64_t first = begin; first < end; first += (int64_t)4 * ROWS)
        for (int64_t col = 0; col < job->y->cols; col += COLS)
            for (int64_t row = first; row < end && row < first + (int64_t)4 * ROWS; row += ROWS) {
                const block_range at = {row, clipft_min(ROWS, end - row), col, clipft_min(COLS, job->y->cols - col)};
                up_block(job, &at, block);
            }
}

bool clipft_lora_up(const clipft_lora *lora, const clipft_host *host, const float *v, const clipft_view *bias, const clipft_view *y)
{
    const int64_t rank = lora->lora_b.cols, stride = clipft_round_up(y->cols, CLIPFT_RANK_PAD);
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, rank * stride, sizeof(float));
    clipft_arena_reserve(&arena, stride, sizeof(float));
    if (clipft_arena_allocate(&arena)) {
        up_job job = {.y = y, .v = v, .rank = rank, .padded = clipft_lora_padded(rank), .stride = stride};
        job.panel = clipft_arena_take(&arena, rank * stride, sizeof(float));
        clipft_lora_pack(clipft_view_transposed(lora->lora_b), lora->scale, job.panel, stride);
        if (bias) {
            job.bias = clipft_arena_take(&arena, stride, sizeof(float));
            memset(job.bias, 0, (size_t)stride * sizeof *job.bias);
            if (bias->data) clipft_view_read(bias, 0, 0, bias->cols, job.bias);
        }
        ok = host->parallel_for(0, y->rows, ROWS, up_rows, &job);
    }
    clipft_arena_free(&arena);
    return ok;
}

/* ---- sums over rows, in parts ---- */

/* The parts of a sum over `rows`: boundaries and count depend on the shape only. */
static int64_t part_count(int64_t rows)
{
    int64_t parts = 1;
    while (parts < PARTS && rows >= 192 * parts) parts *= 2;
    return parts;
}

static int64_t part_begin(int64_t rows, int64_t parts, int64_t part) { return part == parts ? rows : rows * part / parts / 4 * 4; }

typedef struct sum_job {
    const float *sums;      /* [parts, rank rounded up, stride] */
    const clipft_view *out; /* [rank, n] */
    int64_t parts, part_size, stride;
    float scale;
} sum_job;

/* Columns `begin` .. of every row of the sum. */
static void sum_columns(int64_t begin, int64_t end, void *ctx)
{
    const sum_job *job = ctx;
    for (int64_t col = begin; col < end; col += COLS) {
        const int64_t n = clipft_min(COLS, end - col);
        for (int64_t k = 0; k < job->out->rows; ++k) {
            float total[COLS];
            memcpy(total, job->sums + k * job->stride + col, (size_t)n * sizeof *total);
            for (int64_t part = 1; part < job->parts; ++part) {
                const float *sum = job->sums + part * job->part_size + k * job->stride + col;
                for (int64_t j = 0; j < n; ++j) total[j] += sum[j];
            }
            for (int64_t j = 0; j < n; ++j) total[j] *= job->scale;
            clipft_view_write(job->out, k, col, n, total);
        }
    }
}

/* ---- u = s dy B and dB = s dy^T v ---- */

typedef struct gradient_up_job {
    const clipft_view *dy;
    const float *v;
    float *u;     /* or NULL */
    float *panel; /* [out, padded] s B */
    float *sums;  /* [parts, padded, stride] of v^T dy, or NULL */
    int64_t rank, padded, stride, parts;
} gradient_up_job;

static void gradient_up_part(const gradient_up_job *job, int64_t part)
{
    const int64_t begin = part_begin(job->dy->rows, job->parts, part), end = part_begin(job->dy->rows, job->parts, part + 1);
    const bool pages_apart = job->dy->row_stride % PAGE == 0;
    float *sum = job->sums ? job->sums + part * job->padded * job->stride : NULL;
    lora_block block;
    if (sum) memset(sum, 0, (size_t)(job->padded * job->stride) * sizeof *sum);
    for (int64_t row = begin; row < end; row += ROWS) {
        block_range at = {row, clipft_min(ROWS, end - row), 0, 0};
        if (job->u) memset(job->u + row * job->padded, 0, (size_t)(at.rows * job->padded) * sizeof *job->u);
        for (; at.col < job->dy->cols; at.col += COLS) {
            at.cols = clipft_min(COLS, job->dy->cols - at.col);
            const block_rows dy = pages_apart ? load_block(job->dy, &at, block) : block_of(job->dy, &at, block);
            clipft_ahead ahead = block_ahead(job->dy, &at);
            if (job->u) {
                clipft_kernel_table.lora.rank_down(dy.data, dy.stride, at.rows, at.cols, job->panel + at.col * job->padded, job->padded,
                                                   job->u + row * job->padded, ahead);
                ahead.data = NULL;
            }
            if (sum)
                clipft_kernel_table.lora.rank_outer(job->v + row * job->padded, job->padded, at.rows, job->rank, dy.data, dy.stride,
                                                    clipft_round_up(at.cols, CLIPFT_RANK_PAD), sum + at.col, job->stride, ahead);
        }
    }
}

static void gradient_up_parts(int64_t begin, int64_t end, void *ctx)
{
    for (int64_t part = begin; part < end; ++part) gradient_up_part(ctx, part);
}

bool clipft_lora_gradient_up(const clipft_lora *lora, const clipft_host *host, const clipft_view *dy, const float *v, float *u,
                             const clipft_view *d_b)
{
    const int64_t rank = lora->lora_b.cols, padded = clipft_lora_padded(rank), stride = clipft_round_up(dy->cols, CLIPFT_RANK_PAD);
    gradient_up_job job = {.dy = dy, .v = v, .u = u, .rank = rank, .padded = padded, .stride = stride, .parts = part_count(dy->rows)};
    const int64_t panel = u ? dy->cols * padded : 0, sums = d_b->data ? job.parts * padded * stride : 0;
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, panel, sizeof(float));
    clipft_arena_reserve(&arena, sums, sizeof(float));
    if (!clipft_arena_allocate(&arena)) goto done;

    job.panel = clipft_arena_take(&arena, panel, sizeof(float));
    if (u) clipft_lora_pack(lora->lora_b, lora->scale, job.panel, padded);
    if (d_b->data) job.sums = clipft_arena_take(&arena, sums, sizeof(float));
    ok = host->parallel_for(0, job.parts, 1, gradient_up_parts, &job);
    if (ok && d_b->data) {
        const clipft_view out = clipft_view_transposed(*d_b);
        sum_job sum = {job.sums, &out, job.parts, padded * stride, stride, lora->scale};
        ok = host->parallel_for(0, dy->cols, COLS, sum_columns, &sum);
    }
done:
    clipft_arena_free(&arena);
    return ok;
}

/* ---- dA = u^T (m . act(x)) and dx (+)= m . (u A) ---- */

typedef struct gradient_down_job {
    const clipft_lora *lora;
    const clipft_view *x, *d_x;
    const float *u;
    float *panel; /* [rank, stride] A */
    float *sums;  /* [parts, padded, stride] of u^T x, or NULL */
    float *zeros; /* [COLS] */
    bool accumulate;
    int64_t rank, padded, stride, parts;
} gradient_down_job;

typedef struct gradient_blocks {
    block_rows raw;          /* of x */
    lora_block copy, x, out; /* copy: of raw, where it needs one; x: after activation and dropout; out: of d_x */
    lora_mask mask;
} gradient_blocks;

/* A block of d_x, in place or by way of float32: what is there, the masked product added, through the activation's derivative. */
static void d_x_block(const gradient_down_job *job, const block_range *at, gradient_blocks *b)
{
    const bool plain = clipft_view_plain(job->d_x), gelu = job->accumulate && job->lora->quick_gelu;
    float *out = plain ? clipft_view_floats(job->d_x, at->row, at->col) : b->out;
    const int64_t stride = plain ? job->d_x->row_stride : STRIDE;
    const clipft_rank_tile tile = {.v = job->u + at->row * job->padded,
                                   .panel = job->panel + at->col,
                                   .init = job->accumulate ? out : job->zeros,
                                   .out = out,
                                   .mask = job->lora->dropout.active ? b->mask : NULL,
                                   .rows = at->rows,
                                   .cols = at->cols,
                                   .rank = job->rank,
                                   .padded = job->padded,
                                   .panel_stride = job->stride,
                                   .init_stride = job->accumulate ? stride : 0,
                                   .out_stride = stride,
                                   .mask_stride = STRIDE};
    if (job->accumulate && !plain) load_block(job->d_x, at, b->out);
    clipft_kernel_table.lora.rank_up(&tile);
    for (int64_t i = 0; i < at->rows; ++i) {
        float *row = out + i * stride;
        if (gelu) clipft_kernel_table.lora.row_quick_gelu_grad(b->raw.data + i * b->raw.stride, row, row, at->cols);
        if (!plain) clipft_view_write(job->d_x, at->row + i, at->col, at->cols, row);
    }
}

static void gradient_down_block(const gradient_down_job *job, const block_range *at, float *sum, gradient_blocks *b)
{
    b->raw = prepare_block(job->lora, job->x, NULL, at, b->copy, b->x, b->mask);
    if (sum)
        clipft_kernel_table.lora.rank_outer(job->u + at->row * job->padded, job->padded, at->rows, job->rank, b->x, STRIDE,
                                            clipft_round_up(at->cols, CLIPFT_RANK_PAD), sum + at->col, job->stride,
                                            block_ahead(job->x, at));
    if (job->d_x->data) d_x_block(job, at, b);
}

static void gradient_down_parts(int64_t begin, int64_t end, void *ctx)
{
    const gradient_down_job *job = ctx;
    gradient_blocks blocks;
    for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part_begin(job->x->rows, job->parts, part), last = part_begin(job->x->rows, job->parts, part + 1);
        float *sum = job->sums ? job->sums + part * job->padded * job->stride : NULL;
        if (sum) memset(sum, 0, (size_t)(job->padded * job->stride) * sizeof *sum);
        for (int64_t row = first; row < last; row += ROWS)
            for (int64_t col = 0; col < job->x->cols; col += COLS) {
                const block_range at = {row, clipft_min(ROWS, last - row), col, clipft_min(COLS, job->x->cols - col)};
                gradient_down_block(job, &at, sum, &blocks);
            }
    }
}

bool clipft_lora_gradient_down(const clipft_lora *lora, const clipft_host *host, const clipft_view *x, const float *u,
                               const clipft_view *d_a, const clipft_view *d_x, bool accumulate)
{
    const int64_t rank = lora->lora_a.rows, padded = clipft_lora_padded(rank), stride = clipft_round_up(x->cols, CLIPFT_RANK_PAD);
    gradient_down_job job = {.lora = lora,
                             .x = x,
                             .d_x = d_x,
                             .u = u,
                             .accumulate = accumulate,
                             .rank = rank,
                             .padded = padded,
                             .stride = stride,
                             .parts = part_count(x->rows)};
    const int64_t panel = d_x->data ? rank * stride : 0, sums = d_a->data ? job.parts * padded * stride : 0;
    clipft_arena arena = {0};
    bool ok = false;
    clipft_arena_reserve(&arena, panel, sizeof(float));
    clipft_arena_reserve(&arena, sums, sizeof(float));
    clipft_arena_reserve(&arena, COLS, sizeof(float));
    if (!clipft_arena_allocate(&arena)) goto done;

    job.panel = clipft_arena_take(&arena, panel, sizeof(float));
    if (d_x->data) clipft_lora_pack(lora->lora_a, 1.0F, job.panel, stride);
    if (d_a->data) job.sums = clipft_arena_take(&arena, sums, sizeof(float));
    job.zeros = clipft_arena_take(&arena, COLS, sizeof(float));
    memset(job.zeros, 0, COLS * sizeof *job.zeros);
    ok = host->parallel_for(0, job.parts, 1, gradient_down_parts, &job);
    if (ok && d_a->data) {
        sum_job sum = {job.sums, d_a, job.parts, padded * stride, stride, 1.0F};
        ok = host->parallel_for(0, x->cols, COLS, sum_columns, &sum);
    }
done:
    clipft_arena_free(&arena);
    return ok;
}

/* ---- the bias's gradient ---- */

typedef struct column_job {
    const clipft_view *m, *sums;
} column_job;

static void column_sums(int64_t begin, int64_t end, void *ctx)
{
    const column_job *job = ctx;
    for (int64_t col = begin; col < end; col += COLS) {
        const int64_t n = clipft_min(COLS, end - col);
        double total[COLS] = {0.0};
        float row[COLS];
        for (int64_t i = 0; i < job->m->rows; ++i) {
            clipft_view_read(job->m, i, col, n, row);
            for (int64_t j = 0; j < n; ++j) total[j] += (double)row[j];
        }
        for (int64_t j = 0; j < n; ++j) row[j] = (float)total[j];
        clipft_view_write(job->sums, 0, col, n, row);
    }
}

bool clipft_column_sums(const clipft_host *host, const clipft_view *m, const clipft_view *sums)
{
    column_job job = {m, sums};
    return host->parallel_for(0, m->cols, COLS, column_sums, &job);
}
