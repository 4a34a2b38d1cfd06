/* Runs every C test on every instruction set that this machine has. Built plainly, under ASan + UBSan, and for aarch64 under qemu: see
 * Makefile. */
#include "check.h"

int check_passed, check_failed;

static bool plain_gemm(clipft_matrix c, clipft_matrix a, clipft_matrix b, bool accumulate)
{
    for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t j = 0; j < c.cols; ++j) {
            float *out = &c.data[i * c.row_stride + j * c.col_stride];
            float sum = accumulate ? *out : 0.0F;
            for (int64_t k = 0; k < a.cols; ++k)
                sum += a.data[i * a.row_stride + k * a.col_stride] * b.data[k * b.row_stride + j * b.col_stride];
            *out = sum;
        }
    return true;
}

static bool plain_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *ctx)
{
    for (int64_t i = begin; i < end; i += grain) fn(i, i + grain < end ? i + grain : end, ctx);
    return true;
}

static int64_t two_threads(void) { return 2; }

const clipft_host check_host = {plain_gemm, plain_for, two_threads};

static void test_all_but_int8(void)
{
    test_loss_rows();
    test_losses();
    test_convert();
    test_gemm();
    test_lora_rows();
    test_lora();
    test_attention();
}

int main(void)
{
    for (int isa = 0; isa < CLIPFT_ISA_COUNT; ++isa) {
        if (!clipft_dispatch_can((clipft_isa)isa)) {
            printf("isa %s: not on this machine\n", clipft_isa_name((clipft_isa)isa));
            continue;
        }
        const int before = check_passed;
        clipft_dispatch((clipft_isa)isa);
        clipft_isa others;
        clipft_dispatch_slot(0, &others);
        if (others == (clipft_isa)isa) test_all_but_int8(); /* else the tier's below, which has been tested */
        test_int8_rows();
        test_int8();
        test_int8_lora();
        printf("isa %s: %d checks passed\n", clipft_isa_name((clipft_isa)isa), check_passed - before);
    }
    printf("%d passed, %d failed\n", check_passed, check_failed);
    return check_failed != 0;
}
