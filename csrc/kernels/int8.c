/* The two passes of int8.h over a slab of rows: quantise each row, once; then tasks of a block of rows times CLIPFT_INT8_COLS channels,
 * whose sums become results in the L1 cache. Tasks run along the channels first, so that few rows are shared out by channels and many by
 * rows. */
#include "int8.h"
#include "tiles.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    MAGIC = 0x38746e69, /* "int8" */
    GROUP = CLIPFT_INT8_COLS / CLIPFT_INT8_PANEL,
    CHUNK = 12,               /* rows between dot products and results: a multiple of most tiles' rows */
    BLOCK_BYTES = 256 * 1024, /* quantised rows of a task, which stay in the L2 cache beside the group's weights */
    SLAB_BYTES = 8 << 20,     /* quantised rows at a time */
    PIECE = 1024,             /* floats of a row converted at a time */
};

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* ---- packing ---- */

static int64_t panel_bytes(int64_t in) { return round_up(in, 4) * CLIPFT_INT8_PANEL; }

int64_t clipft_int8_packed_size(int64_t out, int64_t in)
{
    const int64_t panels = divide_up(out, CLIPFT_INT8_PANEL);
    return (int64_t)sizeof(clipft_int8_header) + panels * (panel_bytes(in) + CLIPFT_INT8_PANEL * (int64_t)sizeof(int32_t));
}

static const int8_t *packed_weights(const uint8_t *packed) { return (const int8_t *)packed + sizeof(clipft_int8_header); }

static const uint8_t *packed_sums(const uint8_t *packed, int64_t out, int64_t in)
{
    return packed + sizeof(clipft_int8_header) + divide_up(out, CLIPFT_INT8_PANEL) * panel_bytes(in);
}

typedef struct pack_job {
    const int8_t *w;
    int64_t out, in, row_stride, col_stride;
    uint8_t *packed;
} pack_job;

static void pack_panels(int64_t begin, int64_t end, void *ctx)
{
    const pack_job *job = ctx;
    const int64_t bytes = panel_bytes(job->in);
    for (int64_t panel = begin; panel < end; ++panel) {
        int8_t *to = (int8_t *)job->packed + sizeof(clipft_int8_header) + panel * bytes;
        int32_t sums[CLIPFT_INT8_PANEL] = {0};
        memset(to, 0, (size_t)bytes);
        for (int64_t c = 0; c < clipft_min(CLIPFT_INT8_PANEL, job->out - panel * CLIPFT_INT8_PANEL); ++c) {
            const int8_t *row = job->w + (panel * CLIPFT_INT8_PANEL + c) * job->row_stride;
            for (int64_t k = 0; k < job->in; ++k) {
                const int8_t value = row[k * job->col_stride];
                to[k / 4 * 4 * CLIPFT_INT8_PANEL + 4 * c + k % 4] = value;
                sums[c] += value;
            }
        }
        memcpy(job->packed + (packed_sums(job->packed, job->out, job->in) - job->packed) + panel * (int64_t)sizeof sums, sums, sizeof sums);
    }
}

bool clipft_int8_pack(const clipft_host *host, const int8_t *w, int64_t out, int64_t in, int64_t row_stride, int64_t col_stride,
                      uint8_t *packed)
{
    pack_job job = {w, out, in, row_stride, col_stride, packed};
    const clipft_int8_header header = {.magic = MAGIC, .out = out, .in = in};
    memcpy(packed, &header, sizeof header);
    return host->parallel_for(0, divide_up(out, CLIPFT_INT8_PANEL), 4, pack_panels, &job);
}

bool clipft_int8_packed(const uint8_t *packed, int64_t size, clipft_int8_header *header)
{
    if (size < (int64_t)sizeof *header) return false;
    memcpy(header, packed, sizeof *header); /* it may lie anywhere */
    if (header->magic != MAGIC || header->out <= 0 || header->out > CLIPFT_INT8_MAX_OUT) return false;
    if (header->in <= 0 || header->in > CLIPFT_INT8_MAX_IN) return false;
    return clipft_int8_packed_size(header->out, header->in) == size;
}

/* ---- rows of x ---- */

typedef struct int8_job {
    const clipft_int8_layer *layer;
    const clipft_view *x, *y;
    int64_t out, in, depth, stride; /* depth: in as packed; stride: of the quantised rows */
    int64_t first, rows;            /* the slab */
    int64_t block, groups;          /* rows of a task, tasks to a block of rows */
    uint8_t *q;                     /* [rows, stride] */
    float *row_scale;               /* [rows] */
    int32_t *row_zero;              /* [rows] */
} int8_job;

/* Elements j .. of a row of x in float32: in place, or in `copy`. */
static const float *row_piece(const clipft_view *x, int64_t row, int64_t j, int64_t n, float *copy)
{
    if (clipft_view_plain(x)) return clipft_view_floats(x, row, j);
    clipft_view_read(x, row, j, n, copy);
    return copy;
}

static void quantize_row(const int8_job *job, int64_t i)
{
    const int64_t piece = clipft_view_plain(job->x) ? job->in : PIECE;
    uint8_t *q = job->q + i * job->stride;
    float copy[PIECE];
    clipft_range range = {0};
    for (int64_t j = 0; j < job->in; j += piece) {
        const int64_t n = clipft_min(piece, job->in - j);
        clipft_kernel_table.row_range(row_piece(job->x, job->first + i, j, n, copy), n, &range);
    }
    if (isnan(range.bad)) {
        job->row_scale[i] = NAN;
        job->row_zero[i] = 0;
        memset(q, 0, (size_t)job->depth);
        return;
    }
    /* Each end is divided by itself, for their difference may overflow; the floor keeps the inverse finite. */
    const float scale = fmaxf(range.high / 127.0F - range.low / 127.0F, FLT_MIN), inverse = 1.0F / scale;
    const int32_t zero = -(int32_t)nearbyintf(range.low * inverse); /* so that the least value is level 0 */
    job->row_scale[i] = scale;
    job->row_zero[i] = zero;
    for (int64_t j = 0; j < job->in; j += piece) {
        const int64_t n = clipft_min(piece, job->in - j);
        clipft_kernel_table.row_quantize(row_piece(job->x, job->first + i, j, n, copy), n, inverse, zero, q + j);
    }
    memset(q + job->in, 0, (size_t)(job->depth - job->in));
}

static void quantize_rows(int64_t begin, int64_t end, void *ctx)
{
    for (int64_t i = begin; i < end; ++i) quantize_row(ctx, i);
}

/* ---- tasks ---- */

typedef struct columns {
    float scale[CLIPFT_INT8_COLS], bias[CLIPFT_INT8_COLS];
    int32_t sum[CLIPFT_INT8_COLS];
} columns;

static void load_columns(const int8_job *job, int64_t col, int64_t n, int64_t panels, columns *c)
{
    const clipft_int8_layer *layer = job->layer;
    *c = (columns){0};
    clipft_view_read(&layer->scale, 0, col, n, c->scale);
    if (layer->bias.data) clipft_view_read(&layer->bias, 0, col, n, c->bias);
    memcpy(c->sum, packed_sums(layer->packed, job->out, job->in) + col * (int64_t)sizeof(int32_t),
           (size_t)(panels * CLIPFT_INT8_PANEL) * sizeof(int32_t));
}

static void run_task(const int8_job *job, int64_t block, int64_t group)
{
    const int64_t col = group * CLIPFT_INT8_COLS, cols = clipft_min(CLIPFT_INT8_COLS, job->out - col);
    const int64_t end = clipft_min(job->rows, (block + 1) * job->block);
    const bool plain = clipft_view_plain(job->y);
    float staged[CHUNK * CLIPFT_INT8_COLS] __attribute__((aligned(64)));
    int32_t sums[CHUNK * CLIPFT_INT8_COLS] __attribute__((aligned(64)));
    columns c __attribute__((aligned(64)));
    clipft_int8_tile tile = {.w = packed_weights(job->layer->packed) + group * GROUP * panel_bytes(job->in),
                             .x_stride = job->stride,
                             .w_stride = panel_bytes(job->in),
                             .panels = divide_up(cols, CLIPFT_INT8_PANEL),
                             .depth = job->depth};
    clipft_int8_finish finish = {.col_scale = c.scale,
                                 .col_sum = c.sum,
                                 .bias = c.bias,
                                 .cols = cols,
                                 .out_stride = plain ? job->y->row_stride : CLIPFT_INT8_COLS,
                                 .activation = job->layer->activation};
    load_columns(job, col, cols, tile.panels, &c);
    for (int64_t i = block * job->block; i < end; i += CHUNK) {
        tile.x = job->q + i * job->stride;
        tile.rows = finish.rows = clipft_min(CHUNK, end - i);
        finish.row_scale = job->row_scale + i;
        finish.row_zero = job->row_zero + i;
        finish.out = plain ? clipft_view_floats(job->y, job->first + i, col) : staged;
        clipft_kernel_table.int8_dot(&tile, sums);
        clipft_kernel_table.int8_finish(&finish, sums);
        for (int64_t r = 0; !plain && r < tile.rows; ++r)
            clipft_view_write(job->y, job->first + i + r, col, cols, staged + r * CLIPFT_INT8_COLS);
    }
}

static void run_tasks(int64_t begin, int64_t end, void *ctx)
{
    const int8_job *job = ctx;
    for (int64_t task = begin; task < end; ++task) run_task(job, task / job->groups, task % job->groups);
}

static bool run_slab(int8_job *job, const clipft_host *host, int64_t block_rows)
{
    const int64_t blocks = divide_up(job->rows, block_rows);
    job->block = round_up(divide_up(job->rows, blocks), CHUNK);
    return host->parallel_for(0, job->rows, divide_up(16384, job->in), quantize_rows, job) &&
           host->parallel_for(0, divide_up(job->rows, job->block) * job->groups, 1, run_tasks, job);
}

bool clipft_int8_linear(const clipft_int8_layer *layer, const clipft_host *host, const clipft_view *x, const clipft_view *y)
{
    int8_job job = {.layer = layer, .x = x, .y = y, .out = y->cols, .in = x->cols, .depth = round_up(x->cols, 4)};
    clipft_arena arena = {0};
    bool ok = false;
    job.stride = round_up(job.in, 64) + 64; /* never a multiple of a page, which would put all rows into the same few places of the cache */
    job.groups = divide_up(job.out, CLIPFT_INT8_COLS);
    const int64_t block_rows = round_up(divide_up(BLOCK_BYTES, job.stride), CHUNK);
    const int64_t slab = clipft_min(x->rows, round_up(divide_up(SLAB_BYTES, job.stride), block_rows));
    clipft_arena_reserve(&arena, slab * job.stride, 1);
    clipft_arena_reserve(&arena, slab, sizeof(float));
    clipft_arena_reserve(&arena, slab, sizeof(int32_t));
    if (!clipft_arena_allocate(&arena)) goto done;

    job.q = clipft_arena_take(&arena, slab * job.stride, 1);
    job.row_scale = clipft_arena_take(&arena, slab, sizeof(float));
    job.row_zero = clipft_arena_take(&arena, slab, sizeof(int32_t));
    ok = true;
    for (job.first = 0; ok && job.first < x->rows; job.first += slab) {
        job.rows = clipft_min(slab, x->rows - job.first);
        ok = run_slab(&job, host, block_rows);
    }
done:
    clipft_arena_free(&arena);
    return ok;
}
