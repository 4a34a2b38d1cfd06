/* The slot `dot` by SMMLA, which multiplies two rows of eight bytes with two channels of eight bytes. Two blocks of a panel, four bytes of
 * a channel each, are zipped into such pairs of channels. */
#if defined(__aarch64__)
#include "../table.h"

#include <arm_neon.h>
#include <string.h>

#if defined(__clang__)
#define TARGET __attribute__((target("i8mm")))
#define UNROLL _Pragma("unroll")
#else
#define TARGET __attribute__((target("arch=armv8.2-a+i8mm")))
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { PAIRS = 2, BLOCK = 4 * CLIPFT_INT8_PANEL, CHANNEL_PAIRS = CLIPFT_INT8_PANEL / 2 };

/* `bytes` (8 or 4, then zeros) of each of two rows. */
INLINE int8x16_t load_rows(const uint8_t *first, const uint8_t *second, int bytes)
{
    uint64_t two[2] = {0, 0};
    memcpy(&two[0], first, (size_t)bytes);
    memcpy(&two[1], second, (size_t)bytes);
    return vreinterpretq_s8_u64(vld1q_u64(two));
}

/* Eight products of every row and channel; of the last block alone (`bytes` 4) four. */
INLINE void step(const int pairs, const int bytes, const uint8_t *x, int64_t stride, int64_t last, const int8_t *w,
                 int32x4_t acc[PAIRS][CHANNEL_PAIRS])
{
    int8x16_t b[CHANNEL_PAIRS];
    UNROLL for (int c = 0; c < CHANNEL_PAIRS; c += 2)
    {
        const int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(w + 8 * c));
        const int32x4_t high = bytes == 8 ? vreinterpretq_s32_s8(vld1q_s8(w + BLOCK + 8 * c)) : vdupq_n_s32(0);
        b[c] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
        b[c + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    }
    UNROLL for (int i = 0; i < pairs; ++i)
    {
        const int64_t second = 2 * i + 1 < last ? 2 * i + 1 : last;
        const int8x16_t a = load_rows(x + 2 * i * stride, x + second * stride, bytes);
        UNROLL for (int c = 0; c < CHANNEL_PAIRS; ++c) acc[i][c] = vmmlaq_s32(acc[i][c], a, b[c]);
    }
}

/* 2 `pairs` rows, or one less: then the last row is taken twice and stored once. */
INLINE void dot_tile(const int pairs, int64_t rows, const clipft_int8_tile *t, const uint8_t *x, const int8_t *w, int32_t *sums)
{
    int32x4_t acc[PAIRS][CHANNEL_PAIRS];
    int64_t k = 0;
    UNROLL for (int i = 0; i < pairs; ++i) UNROLL for (int c = 0; c < CHANNEL_PAIRS; ++c) acc[i][c] = vdupq_n_s32(0);
    for (; k + 8 <= t->depth; k += 8) step(pairs, 8, x + k, t->x_stride, rows - 1, w + k * CLIPFT_INT8_PANEL, acc);
    if (k < t->depth) step(pairs, 4, x + k, t->x_stride, rows - 1, w + k * CLIPFT_INT8_PANEL, acc);
    UNROLL for (int i = 0; i < pairs; ++i) UNROLL for (int c = 0; c < CHANNEL_PAIRS; ++c)
    {
        int32_t *out = sums + 2 * i * CLIPFT_INT8_COLS + 2 * c;
        vst1_s32(out, vget_low_s32(acc[i][c]));
        if (2 * i + 1 < rows) vst1_s32(out + CLIPFT_INT8_COLS, vget_high_s32(acc[i][c]));
    }
}

static TARGET void clipft_int8_multiply_neon_i8mm(const clipft_int8_tile *tile, int32_t *sums)
{
    const clipft_int8_tile t = *tile;
    for (int64_t p = 0; p < t.panels; ++p) {
        const int8_t *w = t.w + p * t.w_stride;
        for (int64_t i = 0; i < t.rows; i += (int64_t)2 * PAIRS) {
            const int64_t rows = t.rows - i < 2 * PAIRS ? t.rows - i : 2 * PAIRS;
            int32_t *out = sums + i * CLIPFT_INT8_COLS + p * CLIPFT_INT8_PANEL;
            if (rows > 2)
                dot_tile(2, rows, &t, t.x + i * t.x_stride, w, out);
            else
                dot_tile(1, rows, &t, t.x + i * t.x_stride, w, out);
        }
    }
}

const clipft_int8_dot clipft_int8_dot_neon_i8mm = {.layout = CLIPFT_INT8_QUADS,
                                                   .depth = 4,
                                                   .rows = CLIPFT_INT8_DOT_ROWS,
                                                   .pack = clipft_int8_pack_quads,
                                                   .unpack = clipft_int8_unpack_quads,
                                                   .multiply = clipft_int8_multiply_neon_i8mm};
#else
typedef int clipft_not_aarch64; /* ISO C forbids an empty file */
#endif
