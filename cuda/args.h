/* Arguments of the kernels in this folder, one struct a kernel: what the C that launches them and the device agree on.
 *
 * A kernel is found by its name, so csrc/cuda_runtime/kernels.inc lists names and structs. Shapes stand in brackets; what is not said to be
 * strided is contiguous. */
#ifndef CLIPFT_CUDA_ARGS_H
#define CLIPFT_CUDA_ARGS_H

/* Device memory. The emulation in tests/cuda puts a pointer that watches its bounds in its place. */
#ifndef CLIPFT_GLOBAL
#define CLIPFT_GLOBAL(type) type *
#endif

/* A block works on BLOCK_ROWS x BLOCK_COLS elements of a tile with THREADS threads: a warp on WARP_ROWS rows, a lane on LANE_COLS columns.
 */
enum {
    CLIPFT_CUDA_THREADS = 256,
    CLIPFT_CUDA_WARPS = CLIPFT_CUDA_THREADS / 32,
    CLIPFT_CUDA_WARP_ROWS = 8,
    CLIPFT_CUDA_LANE_COLS = 4,
    CLIPFT_CUDA_BLOCK_ROWS = CLIPFT_CUDA_WARPS * CLIPFT_CUDA_WARP_ROWS,
    CLIPFT_CUDA_BLOCK_COLS = 32 * CLIPFT_CUDA_LANE_COLS,
    CLIPFT_CUDA_MERGE_LINES = 32, /* a block of contrastive_merge, a warp on every WARPS'th part */
    CLIPFT_CUDA_SUM_THREADS = 1024
};

/* Floats of three kinds; the 16-bit ones lie in the member that ends in 16. */
enum { CLIPFT_CUDA_FLOAT32, CLIPFT_CUDA_BFLOAT16, CLIPFT_CUDA_FLOAT16 };

/* A matrix's path is its kind where a row is any number of aligned runs of four elements, and this where it is not. */
enum { CLIPFT_CUDA_ANY_LAYOUT = CLIPFT_CUDA_FLOAT16 + 1 };

typedef struct clipft_cuda_matrix {
    CLIPFT_GLOBAL(const float) data32;
    CLIPFT_GLOBAL(const unsigned short) data16;
    long long row_stride, col_stride;
    int kind, path;
} clipft_cuda_matrix;

typedef struct clipft_cuda_target {
    CLIPFT_GLOBAL(float) data32;
    CLIPFT_GLOBAL(unsigned short) data16;
    int kind, path;
} clipft_cuda_target;

/* A tile of raw products <image_i, text_j>, and where it lies in the matrix of logits. */
typedef struct clipft_cuda_tile {
    CLIPFT_GLOBAL(const float) x; /* [rows, cols], rows `stride` apart, a multiple of 4 that has room for all columns; aligned */
    int rows, cols, stride;
    long long row0, col0, row_offset; /* image i pairs with text row_offset + i */
} clipft_cuda_tile;

/* Of the columns, which are all pairs. */
typedef struct clipft_cuda_labels {
    CLIPFT_GLOBAL(const long long) data; /* elements `stride` apart, or null: each pair only of itself */
    long long stride;
} clipft_cuda_labels;

/* Target probabilities: the pair, or uniform over the columns of its label, mixed with the uniform distribution. */
typedef struct clipft_cuda_targets {
    clipft_cuda_labels labels;
    CLIPFT_GLOBAL(const float) weight; /* [cols] 1 / number of columns with the label */
    long long cols;
    float smoothing; /* e in (1 - e) * target + e / cols */
} clipft_cuda_targets;

/* ---- contrastive.cu ---- */

typedef struct clipft_cuda_class_weights_args {
    clipft_cuda_labels labels;
    CLIPFT_GLOBAL(float) weight; /* [cols] */
    long long cols;
} clipft_cuda_class_weights_args;

/* Maxima and sums of exponentials of rows or columns: of each block of a tile, [blocks, lines], and so far, [lines]. */
typedef struct clipft_cuda_lines {
    CLIPFT_GLOBAL(float) part_max;
    CLIPFT_GLOBAL(float) part_sum;
    CLIPFT_GLOBAL(float) max;
    CLIPFT_GLOBAL(double) sum; /* relative to max */
    int blocks, lines;
    int first; /* nothing so far */
} clipft_cuda_lines;

typedef struct clipft_cuda_contrastive_tile_args {
    clipft_cuda_tile tile;
    clipft_cuda_targets targets;
    CLIPFT_GLOBAL(const float) scale; /* [1] */
    clipft_cuda_lines row, col;       /* their parts are written */
    CLIPFT_GLOBAL(float) pair;        /* [all rows] the pair's product */
    CLIPFT_GLOBAL(double) target;     /* [blocks of a whole tile] sum of target probability * product */
    int first;                        /* target holds nothing so far */
} clipft_cuda_contrastive_tile_args;

typedef struct clipft_cuda_contrastive_merge_args {
    clipft_cuda_lines row, col; /* parts go into what there is so far */
} clipft_cuda_contrastive_merge_args;

typedef struct clipft_cuda_contrastive_lse_args {
    CLIPFT_GLOBAL(const float) row_max; /* [rows] */
    CLIPFT_GLOBAL(const float) col_max; /* [cols] */
    CLIPFT_GLOBAL(double) row;          /* [rows] sums in, logsumexp out */
    CLIPFT_GLOBAL(double) col;          /* [cols] */
    CLIPFT_GLOBAL(const float) pair;    /* [rows] */
    CLIPFT_GLOBAL(const float) scale;
    long long rows, cols, row_offset;
} clipft_cuda_contrastive_lse_args;

typedef struct clipft_cuda_contrastive_grad_args {
    clipft_cuda_tile tile;
    clipft_cuda_targets targets;
    CLIPFT_GLOBAL(const float) scale;
    CLIPFT_GLOBAL(const double) row_lse; /* [all rows] */
    CLIPFT_GLOBAL(const double) col_lse; /* [all cols] */
    clipft_cuda_target out;              /* [rows, cols], rows as far apart as the tile's; may be the tile */
    CLIPFT_GLOBAL(float) pair;           /* [all rows] the pair's coefficient, which `out` has as zero */
    float unit;                          /* factor of `out` */
} clipft_cuda_contrastive_grad_args;

/* ---- sigmoid.cu ---- */

typedef struct clipft_cuda_sigmoid_args {
    clipft_cuda_tile tile;
    CLIPFT_GLOBAL(const float) scale;
    CLIPFT_GLOBAL(const float) bias;
    clipft_cuda_labels labels;         /* equal ones are positive pairs */
    CLIPFT_GLOBAL(double) loss;        /* [blocks of a whole tile] sums of the losses */
    CLIPFT_GLOBAL(double) coefficient; /* likewise, here and below of sigmoid_grad alone */
    clipft_cuda_target out;            /* the coefficients and the pairs', as in contrastive_grad */
    CLIPFT_GLOBAL(float) pair;
    float unit;
    int first;
} clipft_cuda_sigmoid_args;

/* ---- losses.cu ---- */

typedef struct clipft_cuda_gradient_add_args {
    CLIPFT_GLOBAL(float) sum; /* [count] */
    CLIPFT_GLOBAL(const float) part;
    long long count;
} clipft_cuda_gradient_add_args;

typedef struct clipft_cuda_gradient_finish_args {
    CLIPFT_GLOBAL(const float) sum; /* [rows, dim] sum of coefficient * unit * other, or null: of nothing; may be out */
    clipft_cuda_matrix value;       /* [rows, dim] what the gradient is of */
    clipft_cuda_matrix other;       /* the other side's embeddings */
    CLIPFT_GLOBAL(const float)
    pair; /* [pairs] the pairs' coefficients: row i has pair p = i - pair_first, which is other's row p + other_first */
    long long rows, dim, pairs, pair_first, other_first;
    CLIPFT_GLOBAL(const float) scale;
    CLIPFT_GLOBAL(const float) grad; /* [1] upstream, or null: 1 */
    double factor;                   /* of the loss: 1 / 2N or 1 / N */
    float unit;
    clipft_cuda_target out;    /* [rows, dim] */
    CLIPFT_GLOBAL(double) dot; /* [rows] <d loss / d (scale * value), value> before factor and grad, or null */
} clipft_cuda_gradient_finish_args;

/* out = factor * scale * grad * (sum of a + sum of b + c_factor * c), with 1 for a scale or grad that is null. */
typedef struct clipft_cuda_sum_args {
    CLIPFT_GLOBAL(const double) a; /* [a_count] */
    CLIPFT_GLOBAL(const double) b; /* [b_count] */
    CLIPFT_GLOBAL(const double) c; /* [1] or null */
    long long a_count, b_count;
    double c_factor, factor;
    CLIPFT_GLOBAL(const float) scale;
    CLIPFT_GLOBAL(const float) grad;
    CLIPFT_GLOBAL(float) out32; /* [1], one of the two */
    CLIPFT_GLOBAL(double) out64;
} clipft_cuda_sum_args;

/* ---- quantized.cu ---- */

/* A thread holds INT8_HELD quads of the row that is quantized; a block of int8_finish works on FINISH_ROWS x FINISH_COLS. */
enum { CLIPFT_CUDA_INT8_HELD = 8, CLIPFT_CUDA_INT8_FINISH_ROWS = 8 * CLIPFT_CUDA_WARPS, CLIPFT_CUDA_INT8_FINISH_COLS = 32 * 4 };

/* Rows in int8, levels minus the row's zero point, four to a word. */
typedef struct clipft_cuda_int8_rows {
    CLIPFT_GLOBAL(unsigned) q;  /* [rows, words], zeros from `in` on */
    CLIPFT_GLOBAL(float) scale; /* [rows] */
    int rows, in, words;
    int team; /* warps to a row: 1, 2, 4 or 8 */
} clipft_cuda_int8_rows;

/* What a layer's results are made of: act(sum * row_scale * col_scale + bias). */
typedef struct clipft_cuda_int8_sums {
    CLIPFT_GLOBAL(const int) sums; /* [rows, out], rows `stride` apart, a multiple of 4 */
    CLIPFT_GLOBAL(const float) row_scale;
    clipft_cuda_matrix col_scale, bias; /* [1, out]; the bias may lack data */
    int stride, activation;             /* clipft_activation */
} clipft_cuda_int8_sums;

typedef struct clipft_cuda_int8_quantize_args {
    clipft_cuda_matrix x;                      /* [rows, in] */
    clipft_cuda_matrix norm_weight, norm_bias; /* [1, in], or without data: no norm */
    float norm_eps;
    clipft_cuda_int8_rows out;
} clipft_cuda_int8_quantize_args;

typedef struct clipft_cuda_int8_requantize_args {
    clipft_cuda_int8_sums layer; /* of as many rows and columns as `out`, whose scale may be its row_scale */
    clipft_cuda_int8_rows out;
} clipft_cuda_int8_requantize_args;

typedef struct clipft_cuda_int8_finish_args {
    clipft_cuda_int8_sums layer;
    clipft_cuda_matrix residual; /* [rows, cols] or without data */
    clipft_cuda_target out;      /* [rows, cols] */
    int rows, cols;
} clipft_cuda_int8_finish_args;

/* ---- lora.cu ---- */

/* A block of lora_down takes DOWN_ROWS rows, one of lora_up UP_ROWS, RANK of the rank, and all take COLS columns at a time. Sums are split
 * into parts until there are about as many blocks as an H100 runs at once: on every GPU, so that results are the same. */
enum {
    CLIPFT_CUDA_LORA_DOWN_ROWS = 64,
    CLIPFT_CUDA_LORA_UP_ROWS = 128,
    CLIPFT_CUDA_LORA_COLS = 128,
    CLIPFT_CUDA_LORA_RANK = 16,
    CLIPFT_CUDA_LORA_PART_ROWS = 128,     /* of a sum over rows, at least */
    CLIPFT_CUDA_LORA_OUTER_THREADS = 128, /* of lora_outer, whose sums take more registers than a larger block's threads have */
    CLIPFT_CUDA_LORA_DOWN_BLOCKS = 264,
    CLIPFT_CUDA_LORA_OUTER_BLOCKS = 396
};

/* The mask m: element (row, col) of the input is kept or not, see csrc/kernels/lora/lora.h. */
typedef struct clipft_cuda_dropout {
    CLIPFT_GLOBAL(const long long) seed; /* [1], or null: all are kept */
    int threshold;
} clipft_cuda_dropout;

/* What the branch takes of a matrix: m . act(x). */
typedef struct clipft_cuda_branch {
    clipft_cuda_matrix x; /* [rows, cols] */
    clipft_cuda_dropout dropout;
    int rows, cols, quick_gelu;
} clipft_cuda_branch;

/* Rows of the rank's size, or ones. */
typedef struct clipft_cuda_lora_v {
    CLIPFT_GLOBAL(const float) data; /* [rows, padded], or null: ones */
    int padded;                      /* a multiple of RANK */
} clipft_cuda_lora_v;

/* v = scale * branch panel^T over each part of the columns: a whole number of COLS */
typedef struct clipft_cuda_lora_down_args {
    clipft_cuda_branch branch;
    clipft_cuda_matrix panel; /* [rank, cols] */
    CLIPFT_GLOBAL(float) v;   /* [parts, rows, padded], zeros from `rank` on */
    int rank, padded, parts;
    float scale;
} clipft_cuda_lora_down_args;

/* out = (base + m . (scale * v panel)) * act'(x) */
typedef struct clipft_cuda_lora_up_args {
    clipft_cuda_lora_v v;
    clipft_cuda_matrix panel; /* [rank, cols] */
    clipft_cuda_matrix base;  /* [rows, cols], may be out */
    clipft_cuda_matrix x;     /* [rows, cols], or without data: no act' */
    clipft_cuda_target out;   /* [rows, cols] */
    clipft_cuda_dropout dropout;
    int rows, cols, rank;
    float scale;
} clipft_cuda_lora_up_args;

/* part = v^T branch over each part of the rows */
typedef struct clipft_cuda_lora_outer_args {
    clipft_cuda_lora_v v;
    clipft_cuda_branch branch;
    CLIPFT_GLOBAL(float) part; /* [parts, rank, cols] */
    int rank, parts;
} clipft_cuda_lora_outer_args;

/* out[k][j] = scale * (sum of part[.][k][j]) */
typedef struct clipft_cuda_lora_sum_args {
    CLIPFT_GLOBAL(const float) part; /* [parts, rank, cols] */
    clipft_cuda_target out;          /* element (k, j) at k * rank_stride + j * col_stride */
    int parts, rank, cols;
    float scale;
    long long rank_stride, col_stride;
} clipft_cuda_lora_sum_args;

enum { CLIPFT_CUDA_GELU_COLS = 256, CLIPFT_CUDA_GELU_ROWS = 4 * CLIPFT_CUDA_THREADS / CLIPFT_CUDA_GELU_COLS };

/* out = quick_gelu(x), or grad * quick_gelu'(x) */
typedef struct clipft_cuda_quick_gelu_args {
    clipft_cuda_matrix x;    /* [rows, cols] */
    clipft_cuda_matrix grad; /* [rows, cols], or without data */
    clipft_cuda_target out;  /* [rows, cols] */
    long long rows, cols;
} clipft_cuda_quick_gelu_args;

typedef struct clipft_cuda_dropout_mask_args {
    clipft_cuda_dropout dropout;
    CLIPFT_GLOBAL(float) mask; /* [rows, cols] */
    long long rows, cols;
} clipft_cuda_dropout_mask_args;

#endif
