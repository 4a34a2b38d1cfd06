/* aarch64's baseline: 32 registers of 4 floats. What simd.h wants to know of a tier. */
#define CLIPFT_ISA neon
#define CLIPFT_LANES 4
#define CLIPFT_TARGET /* part of the baseline */
