/* AVX-512 F, BW, DQ, VL: 32 registers of 16 floats. What simd.h wants to know of a tier. */
#define CLIPFT_ISA avx512
#define CLIPFT_LANES 16
#define CLIPFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
