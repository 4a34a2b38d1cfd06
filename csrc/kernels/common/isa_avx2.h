/* AVX2, FMA: 16 registers of 8 floats. What simd.h wants to know of a tier. */
#define CLIPFT_ISA avx2
#define CLIPFT_LANES 8
#define CLIPFT_TARGET __attribute__((target("avx2,fma")))
