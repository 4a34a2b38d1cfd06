/* What the two losses share on CUDA: inputs, the walk over the tiles with torch's matrix products, and gradients.
 *
 * A tile of raw products image text^T, float32, is a few times as large as the GPU's L2 cache (docs/notes says why): one product by
 * cuBLAS, one kernel over it, and in the backward pass two more products of the coefficients that the kernel makes of it. 16-bit embeddings
 * have 16-bit coefficients, so that all products run on tensor cores; sums are float32 throughout. */
#ifndef CLIPFT_LOSS_CUDA_H
#define CLIPFT_LOSS_CUDA_H

#include "../cuda_runtime/call.h"
#include "loss_inputs.h"

typedef struct cuda_loss {
    loss_inputs in;
    cuda_call call;
    int64_t rows, cols, dim;              /* images, texts, features */
    int64_t tile_rows, tile_cols, stride; /* of a whole tile; between its rows */
    float *products;                      /* [tile_rows, stride] */
} cuda_loss;

/* Unboxes and checks what every op takes, prepares the device and makes room for a tile. */
bool cuda_loss_begin(cuda_loss *loss, clipft_cuda_file file, const loss_slots *slots);
void cuda_loss_end(cuda_loss *loss);

/* A block for each block of the tile. */
bool cuda_loss_launch_tile(cuda_loss *loss, clipft_cuda_kernel kernel, const clipft_cuda_tile *tile, void *args);

/* Blocks of a whole tile: what a sum of each block needs. */
int64_t cuda_loss_tile_blocks(const cuda_loss *loss);

/* Calls `visit` with the products of each tile, row by row of tiles; the first tile is the largest. */
bool cuda_loss_walk(cuda_loss *loss, bool (*visit)(cuda_loss *loss, const clipft_cuda_tile *tile, void *ctx), void *ctx);

/* Launches `sum`, whose output is set. */
bool cuda_loss_launch_sum(cuda_loss *loss, clipft_cuda_sum_args sum);
/* A new 0-d result of `sum`, whose output is set here. */
bool cuda_loss_sum(cuda_loss *loss, int32_t dtype, clipft_cuda_sum_args sum, clipft_tensor *out);

typedef struct cuda_gradients {
    clipft_tensor image, text;   /* [0, 0] where not needed; of one dtype */
    float *image_sum, *text_sum; /* of coefficient * unit * other; NULL where not computed */
    float *part;                 /* a tile's share, where torch cannot add it itself */
    clipft_cuda_target out;      /* a tile's coefficients */
    float *pair;                 /* [rows] the pairs' coefficients */
    float unit;
} cuda_gradients;

/* Of that dtype. Where the scale needs a gradient one of the two is needed, for it is made from that. */
bool cuda_gradients_make(cuda_loss *loss, bool needs_image, bool needs_text, int32_t dtype, cuda_gradients *grad);
/* Adds the share of the tile, whose coefficients lie in grad->out. */
bool cuda_gradients_add(cuda_loss *loss, const clipft_cuda_tile *tile, cuda_gradients *grad);
/* The gradients of factor * upstream * (the sum that the coefficients are of), and the scale's, [1] on the device; upstream: likewise, or
 * NULL for 1. */
bool cuda_gradients_finish(cuda_loss *loss, const float *upstream, double factor, cuda_gradients *grad, float *d_scale);
void cuda_gradients_free(cuda_gradients *grad);

#endif
