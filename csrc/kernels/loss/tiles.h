/* Walking a matrix of logits tile by tile. A tile holds raw products image text^T in float32: one GEMM, then passes over its rows in
 * parallel. */
#ifndef CLIPFT_TILES_H
#define CLIPFT_TILES_H

#include "../common/arena.h"
#include "../common/sizes.h"
#include "loss.h"

/* Rows that one task handles. Partial sums belong to a chunk, not to a thread, so results do not depend on the number of threads. */
enum { CLIPFT_CHUNK = 64, CLIPFT_CHUNKS = CLIPFT_TILE / CLIPFT_CHUNK };

/* Between rows of the work space: never a multiple of a page, which would put a column of the tile into the same few places of the cache.
 */
enum { CLIPFT_TILE_STRIDE = CLIPFT_TILE + 16, CLIPFT_TILE_ITEMS = CLIPFT_TILE * CLIPFT_TILE_STRIDE };

typedef struct clipft_tile {
    clipft_matrix x;    /* [rows, cols] products */
    clipft_matrix out;  /* [rows, cols] where a gradient may be written: x itself, or the work space beside products that are kept */
    int64_t row0, col0; /* where it lies in the logits */
} clipft_tile;

/* The products of the tile at (row0, col0), computed into `work` (CLIPFT_TILE_ITEMS floats) or, for rows that are kept, into their place.
 * With `reuse` kept rows are taken as they are, and stay so. */
bool clipft_tile_load(const clipft_logits *logits, const clipft_host *host, int64_t row0, int64_t col0, float *work, bool reuse,
                      clipft_tile *tile);

/* The first tile, and the next in row-major order; both false past the end. */
static inline bool clipft_tile_next(const clipft_logits *logits, int64_t *row0, int64_t *col0)
{
    *col0 += CLIPFT_TILE;
    if (*col0 >= logits->text.rows) {
        *col0 = 0;
        *row0 += CLIPFT_TILE;
    }
    return *row0 < logits->image.rows;
}

/* Index within the tile's row i of the row's own pair, or -1. */
static inline int64_t clipft_tile_pair(const clipft_logits *logits, const clipft_tile *tile, int64_t i)
{
    const int64_t j = logits->row_offset + tile->row0 + i - tile->col0;
    return j >= 0 && j < tile->x.cols ? j : -1;
}

/* d_image's rows += tile.out text, d_text's rows += tile.out^T image; the first tile of a row or column of tiles overwrites. A gradient
 * without data is not wanted. */
bool clipft_tile_accumulate(const clipft_logits *logits, const clipft_host *host, const clipft_tile *tile, clipft_matrix d_image,
                            clipft_matrix d_text);

/* After all tiles: *d_scale = sum <d_image_i, image_i> (or the same over the texts), then d_image and d_text *= scale. */
bool clipft_finish_gradients(const clipft_logits *logits, const clipft_host *host, clipft_matrix d_image, clipft_matrix d_text,
                             double *d_scale);

#endif
