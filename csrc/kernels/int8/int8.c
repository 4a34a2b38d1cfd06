/* Layers over blocks of rows. A block goes through the whole chain in the L2 cache: its rows are normed and quantised once, then multiplied
 * by CLIPFT_INT8_COLS channels at a time, whose sums become results in the L1 cache. Where the rows are too few for the threads to share
 * them out, the threads share each layer's channels instead. */
#include "int8.h"

#include "../common/arena.h"
#include "../common/sizes.h"
#include "../table.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum {
    GROUP = CLIPFT_INT8_COLS / CLIPFT_INT8_PANEL,
    FEW = 48,                 /* rows to a thread, below which channels are shared out */
    BLOCK_BYTES = 768 * 1024, /* work space of a block of rows, which stays in the L2 cache */
    BLOCK_ROWS = 240,         /* of a block at most: more would leave threads waiting for the last of them */
};

/* Of sums and results: rows of a tile, and a line of the cache more, so that no two of them begin the same few bytes into a page. */
enum { CHUNK_ITEMS = CLIPFT_INT8_ROWS * CLIPFT_INT8_COLS + 16 };

/* Rows on their way through the layers. */
typedef struct workspace {
    uint8_t *q;         /* [rows, stride of the layer] */
    float *row_scale;   /* [rows] */
    int32_t *row_zero;  /* [rows] */
    clipft_view hidden; /* [rows, out of the first of two layers] */
    float *row;         /* [in] */
} workspace;

typedef struct stage {
    const clipft_int8_layer *layer;
    int64_t depth, stride, groups, panel_bytes; /* depth: in as packed; stride: of the quantised rows */
} stage;

typedef struct int8_job {
    const clipft_int8_chain *chain;
    const clipft_int8_dot *dot;
    const clipft_view *x, *y;
    stage stages[CLIPFT_INT8_LAYERS];
    const float *norm_weight, *norm_bias; /* [in], NULL: no norm */
    const float *factor;                  /* [in], NULL: none */
    workspace *spaces;                    /* [workers] */
    int64_t workers, block_rows;

    void (*task)(struct int8_job *job, const workspace *own, int64_t index);
    int64_t tasks;
    int at; /* the layer, where channels are shared out */
    atomic_llong next;
} int8_job;

/* ---- rows ---- */

/* What a row of x passes before it is quantised. */
static const float *prepare_row(const int8_job *job, const float *x, float *row)
{
    const int64_t n = job->x->cols;
    if (job->norm_weight) {
        clipft_kernel_table.int8.row_norm(x, n, job->norm_weight, job->norm_bias, job->chain->norm_eps, row);
        x = row;
    }
    if (job->factor) {
        clipft_kernel_table.int8.row_scale(x, n, job->factor, row);
        x = row;
    }
    if (job->chain->quick_gelu) {
        clipft_kernel_table.lora.row_quick_gelu(x, row, n);
        x = row;
    }
    return x;
}

static const float *read_row(const int8_job *job, int at, const workspace *space, int64_t first, int64_t i, float *row)
{
    const clipft_view *from = at > 0 ? &space->hidden : job->x;
    const int64_t index = at > 0 ? i : first + i;
    const float *x = row;
    if (clipft_view_plain(from))
        x = clipft_view_floats(from, index, 0);
    else
        clipft_view_read(from, index, 0, from->cols, row);
    return at > 0 ? x : prepare_row(job, x, row);
}

/* Row i of the work space, row `first` + i of x; `row` has room for one. */
static void quantize_row(const int8_job *job, int at, const workspace *space, int64_t first, int64_t i, float *row)
{
    const stage *s = &job->stages[at];
    const int64_t in = s->layer->in;
    const float *x = read_row(job, at, space, first, i, row);
    uint8_t *q = space->q + i * s->stride;
    clipft_range range = {0};
    clipft_kernel_table.int8.row_range(x, in, &range);
    if (isnan(range.bad)) {
        space->row_scale[i] = NAN;
        space->row_zero[i] = 0;
        memset(q, 0, (size_t)s->depth);
        return;
    }
    /* Each end is divided by itself, for their difference may overflow; the floor keeps the inverse finite. */
    const float scale = fmaxf(range.high / 127.0F - range.low / 127.0F, FLT_MIN), inverse = 1.0F / scale;
    const int32_t zero = -(int32_t)nearbyintf(range.low * inverse); /* so that the least value is level 0 */
    space->row_scale[i] = scale;
    space->row_zero[i] = zero;
    clipft_kernel_table.int8.row_quantize(x, in, inverse, zero, q);
    memset(q + in, 0, (size_t)(s->depth - in));
}

/* ---- products ---- */

typedef struct columns {
    float scale[CLIPFT_INT8_COLS], bias[CLIPFT_INT8_COLS];
    int32_t sum[CLIPFT_INT8_COLS];
} columns;

static void load_columns(const stage *s, int64_t col, int64_t n, columns *c)
{
    const clipft_int8_layer *layer = s->layer;
    *c = (columns){0};
    for (int64_t j = 0; !layer->scale.data && j < n; ++j) c->scale[j] = 1.0F;
    if (layer->scale.data) clipft_view_read(&layer->scale, 0, col, n, c->scale);
    if (layer->bias.data) clipft_view_read(&layer->bias, 0, col, n, c->bias);
    memcpy(c->sum, clipft_int8_sums(layer->packed, layer->out, s->panel_bytes) + col * (int64_t)sizeof(int32_t),
           (size_t)n * sizeof(int32_t));
}

/* A [rows, cols] piece of a view at (row, col): in place, or in `copy`, rows CLIPFT_INT8_COLS apart. */
static float *piece(const clipft_view *view, int64_t row, int64_t col, float *copy, int64_t *stride)
{
    const bool plain = clipft_view_plain(view);
    *stride = plain ? view->row_stride : CLIPFT_INT8_COLS;
    return plain ? clipft_view_floats(view, row, col) : copy;
}

/* Adds the branch to results, whose first is at (row, col). */
static void add_branch(const clipft_int8_branch *branch, const clipft_int8_finish *finish, int64_t row, int64_t col)
{
    const clipft_rank_tile tile = {.v = branch->v + row * branch->padded,
                                   .panel = branch->panel + col,
                                   .init = finish->out,
                                   .out = finish->out,
                                   .rows = finish->rows,
                                   .cols = finish->cols,
                                   .rank = branch->rank,
                                   .padded = branch->padded,
                                   .panel_stride = branch->panel_stride,
                                   .init_stride = finish->out_stride,
                                   .out_stride = finish->out_stride};
    clipft_kernel_table.lora.rank_up(&tile);
}

/* Rows begin .. end - 1 of the work space times a group of channels. */
static void multiply(const int8_job *job, int at, const workspace *space, int64_t first, int64_t begin, int64_t end, int64_t group)
{
    const stage *s = &job->stages[at];
    const clipft_int8_dot *dot = job->dot;
    const bool last = at == job->chain->count - 1;
    const clipft_view *y = last ? job->y : &space->hidden, *residual = last ? &job->chain->residual : NULL;
    const int64_t row0 = last ? first : 0, col = group * CLIPFT_INT8_COLS, cols = clipft_min(CLIPFT_INT8_COLS, s->layer->out - col);
    const int64_t panel = s->panel_bytes, chunk = dot->rows;
    float staged[CHUNK_ITEMS] __attribute__((aligned(64))), added[CHUNK_ITEMS] __attribute__((aligned(64)));
    int32_t sums[CHUNK_ITEMS] __attribute__((aligned(64)));
    columns c __attribute__((aligned(64)));
    clipft_int8_tile tile = {.w = clipft_int8_panels(s->layer->packed) + group * GROUP * panel,
                             .x_stride = s->stride,
                             .w_stride = panel,
                             .panels = clipft_divide_up(cols, CLIPFT_INT8_PANEL),
                             .depth = s->depth,
                             .marks_stride = clipft_int8_panel_marks(panel)};
    clipft_int8_finish finish = {.col_scale = c.scale, .col_sum = c.sum, .bias = c.bias, .cols = cols, .activation = s->layer->activation};
    load_columns(s, col, cols, &c);
    tile.marks = clipft_int8_marks(s->layer->packed, s->layer->out, panel) + group * GROUP * tile.marks_stride;
    int64_t asked = 0; /* panels of the next group */
    for (int64_t i = begin; i < end; i += chunk, asked += 2) {
        tile.x = space->q + i * s->stride;
        tile.rows = finish.rows = clipft_min(chunk, end - i);
        finish.row_scale = space->row_scale + i;
        finish.row_zero = space->row_zero + i;
        finish.out = piece(y, row0 + i, col, staged, &finish.out_stride);
        if (residual && residual->data) {
            finish.residual = piece(residual, row0 + i, col, added, &finish.residual_stride);
            for (int64_t r = 0; finish.residual == added && r < tile.rows; ++r)
                clipft_view_read(residual, row0 + i + r, col, cols, added + r * CLIPFT_INT8_COLS);
        }
        for (int64_t r = 0; r < tile.rows; ++r)
            for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(finish.out + r * finish.out_stride + j, 1);
        tile.ahead = tile.w + (GROUP + asked) * panel;
        tile.ahead_panels = group + 1 < s->groups && asked < GROUP ? 2 : 0;
        dot->multiply(&tile, sums);
        clipft_kernel_table.int8.finish(&finish, sums);
        if (last && job->chain->branch.v) add_branch(&job->chain->branch, &finish, row0 + i, col);
        for (int64_t r = 0; finish.out == staged && r < tile.rows; ++r)
            clipft_view_write(y, row0 + i + r, col, cols, staged + r * CLIPFT_INT8_COLS);
    }
}

/* ---- sharing out ---- */

/* Some rows through all layers. */
static void run_block(int8_job *job, const workspace *own, int64_t index)
{
    const int64_t first = index * job->block_rows, rows = clipft_min(job->block_rows, job->x->rows - first);
    for (int at = 0; at < job->chain->count; ++at) {
        for (int64_t i = 0; i < rows; ++i) quantize_row(job, at, own, first, i, own->row);
        for (int64_t group = 0; group < job->stages[at].groups; ++group) multiply(job, at, own, first, 0, rows, group);
    }
}

/* All rows through one layer, in the first worker's work space. */
static void quantize_rows(int8_job *job, const workspace *own, int64_t index)
{
    const int64_t chunk = job->dot->rows, end = clipft_min((index + 1) * chunk, job->x->rows);
    for (int64_t i = index * chunk; i < end; ++i) quantize_row(job, job->at, job->spaces, 0, i, own->row);
}

static void run_groups(int64_t begin, int64_t end, void *ctx)
{
    const int8_job *job = ctx;
    if (job->dot->enter) job->dot->enter();
    for (int64_t group = begin; group < end; ++group) multiply(job, job->at, job->spaces, 0, 0, job->x->rows, group);
    if (job->dot->leave) job->dot->leave();
}

static void work(int64_t begin, int64_t end, void *ctx)
{
    (void)end; /* whoever comes takes the next task, so that none waits for a slower one */
    int8_job *job = ctx;
    if (job->dot->enter) job->dot->enter();
    for (int64_t index; (index = atomic_fetch_add(&job->next, 1)) < job->tasks;) job->task(job, &job->spaces[begin], index);
    if (job->dot->leave) job->dot->leave();
}

static bool run(int8_job *job, const clipft_host *host, int64_t tasks, void (*task)(int8_job *, const workspace *, int64_t))
{
    job->task = task;
    job->tasks = tasks;
    atomic_store(&job->next, 0);
    return host->parallel_for(0, clipft_min(tasks, job->workers), 1, work, job);
}

static bool run_layers(int8_job *job, const clipft_host *host)
{
    bool ok = true;
    if (job->block_rows > 0) return run(job, host, clipft_divide_up(job->x->rows, job->block_rows), run_block);
    for (job->at = 0; ok && job->at < job->chain->count; ++job->at)
        ok = run(job, host, clipft_divide_up(job->x->rows, job->dot->rows), quantize_rows) &&
             host->parallel_for(0, job->stages[job->at].groups, 1, run_groups, job);
    return ok;
}

/* ---- work space ---- */

/* Sizes of everything: how rows are shared out, and what each worker needs for them. */
typedef struct sizes {
    int64_t stride, hidden, in; /* bytes of a quantised row, floats of a hidden row and of a row of x */
} sizes;

static sizes plan(int8_job *job, const clipft_host *host)
{
    const int64_t rows = job->x->rows;
    sizes z = {.stride = 64, .hidden = job->chain->count > 1 ? job->chain->layers[0].out : 0, .in = job->x->cols};
    for (int at = 0; at < job->chain->count; ++at) {
        const clipft_int8_layer *layer = &job->chain->layers[at];
        /* Never a multiple of a page, which would put all rows into the same few places of the cache. */
        job->stages[at] = (stage){layer, clipft_round_up(layer->in, job->dot->depth), clipft_round_up(layer->in, 64) + 64,
                                  clipft_divide_up(layer->out, CLIPFT_INT8_COLS), clipft_int8_panel_bytes(job->dot, layer->in)};
        if (job->stages[at].stride > z.stride) z.stride = job->stages[at].stride;
    }
    job->workers = host->threads();
    if (rows >= FEW * job->workers) {
        const int64_t fit = clipft_min(BLOCK_BYTES / (z.stride + z.hidden * (int64_t)sizeof(float)), BLOCK_ROWS);
        const int64_t blocks = clipft_round_up(clipft_divide_up(rows, fit > job->dot->rows ? fit : job->dot->rows), job->workers);
        job->block_rows = clipft_divide_up(rows, blocks);
    }
    return z;
}

/* Claims every piece: called before `arena` is allocated and once more after. */
static void claim_all(int8_job *job, const sizes *z, clipft_arena *arena)
{
    const clipft_int8_chain *chain = job->chain;
    const bool norm = chain->norm_weight.data, scaled = chain->factor.data;
    float *factor = clipft_arena_claim(arena, scaled ? z->in : 0, sizeof(float));
    float *weight = clipft_arena_claim(arena, norm ? z->in : 0, sizeof(float)),
          *bias = clipft_arena_claim(arena, norm ? z->in : 0, sizeof(float));
    workspace *spaces = clipft_arena_claim(arena, job->workers, sizeof *spaces);
    for (int64_t worker = 0; worker < job->workers; ++worker) {
        const int64_t rows = job->block_rows > 0 ? job->block_rows : worker == 0 ? job->x->rows : 0;
        workspace w = {
            .q = clipft_arena_claim(arena, rows * z->stride, 1),
            .row_scale = clipft_arena_claim(arena, rows, sizeof(float)),
            .row_zero = clipft_arena_claim(arena, rows, sizeof(int32_t)),
            .hidden = {clipft_arena_claim(arena, rows * z->hidden, sizeof(float)), rows, z->hidden, z->hidden, 1, CLIPFT_FLOAT32},
            .row = clipft_arena_claim(arena, z->in, sizeof(float))};
        if (spaces) spaces[worker] = w;
    }
    job->spaces = spaces;
    if (!spaces) return;
    if (norm) {
        clipft_view_read(&chain->norm_weight, 0, 0, z->in, weight);
        clipft_view_read(&chain->norm_bias, 0, 0, z->in, bias);
        job->norm_weight = weight;
        job->norm_bias = bias;
    }
    if (scaled) {
        clipft_view_read(&chain->factor, 0, 0, z->in, factor);
        job->factor = factor;
    }
}

bool clipft_int8_run(const clipft_int8_chain *chain, const clipft_host *host, const clipft_view *x, const clipft_view *y)
{
    int8_job job = {.chain = chain, .dot = clipft_kernel_table.int8.dot, .x = x, .y = y};
    clipft_arena arena = {0};
    bool ok = false;
    if (x->rows == 0) return true;
    const sizes z = plan(&job, host);
    claim_all(&job, &z, &arena);
    if (!clipft_arena_allocate(&arena)) goto done;
    claim_all(&job, &z, &arena);
    ok = run_layers(&job, host);
done:
    clipft_arena_free(&arena);
    return ok;
}
