/* All 65536 bfloat16 and float16 values there and back, and rounding of what lies between. */
#include "check.h"

#include "../../csrc/kernels/common/convert.h"

#include <string.h>

static double half_value(uint16_t h)
{
    const int exponent = (h >> 10) & 31, fraction = h & 1023;
    const double sign = h & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024.0 + fraction, exponent - 25) : ldexp(fraction, -24));
}

static void check_bits(unsigned got, unsigned want, const char *what)
{
    if (got != want)
        check_near(got, want, 0.0, what, 0);
    else
        ++check_passed;
}

void test_convert(void)
{
    for (unsigned h = 0; h < 65536; ++h) {
        const uint16_t in = (uint16_t)h;
        uint16_t out;
        uint32_t bits;
        float f;
        clipft_float16_to_float(&in, &f, 1);
        const double want = half_value(in);
        if (!((double)f == want || (isnan(f) && isnan(want)))) check_near((double)f, want, 0.0, "float16", (int64_t)h);
        clipft_float_to_float16(&f, &out, 1);
        if (!isnan(f)) check_bits(out, in, "float16 round trip");
        clipft_bfloat16_to_float(&in, &f, 1);
        memcpy(&bits, &f, sizeof bits);
        check_bits(bits, h << 16, "bfloat16");
        clipft_float_to_bfloat16(&f, &out, 1);
        if (!isnan(f))
            check_bits(out, in, "bfloat16 round trip");
        else
            check_bits((out & 0x7fffU) > 0x7f80U, 1, "bfloat16 NaN");
    }
    /* Halfway cases go to even; just above goes up; the largest overflows at 65520. */
    const float in[] = {1.0F + 0x1p-11F, 1.0F + 3 * 0x1p-11F, 1.0F + 0x1p-11F + 0x1p-20F, 65519.0F, 65520.0F, 0x1p-25F, 0x1.8p-24F, 1e-10F,
                        -2.5e-8F};
    const uint16_t want[] = {0x3c00, 0x3c02, 0x3c01, 0x7bff, 0x7c00, 0x0000, 0x0002, 0x0000, 0x8000};
    uint16_t out[sizeof want / sizeof *want];
    clipft_float_to_float16(in, out, (int64_t)(sizeof want / sizeof *want));
    for (unsigned k = 0; k < sizeof want / sizeof *want; ++k) check_bits(out[k], want[k], "float16 rounding");
}
