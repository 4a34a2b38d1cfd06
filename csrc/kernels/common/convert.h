/* 16-bit floats to float32 and back (round to nearest even). */
#ifndef CLIPFT_CONVERT_H
#define CLIPFT_CONVERT_H

#include <stdint.h>

void clipft_bfloat16_to_float(const uint16_t *src, float *dst, int64_t n);
void clipft_float16_to_float(const uint16_t *src, float *dst, int64_t n);
void clipft_float_to_bfloat16(const float *src, uint16_t *dst, int64_t n);
void clipft_float_to_float16(const float *src, uint16_t *dst, int64_t n);

#endif
