/* Where a driver runs: torch in the extension, plain C in tests/c. */
#ifndef CLIPFT_HOST_H
#define CLIPFT_HOST_H

#include "matrix.h"

#include <stdbool.h>

/* What a driver needs from it. Calls return false when the host failed. */
typedef struct clipft_host {
    /* c = a b, or c += a b. Uses all threads itself. */
    bool (*gemm)(clipft_matrix c, clipft_matrix a, clipft_matrix b, bool accumulate);
    /* Calls fn on sub-ranges that cover begin .. end - 1, of `grain` items or more, but for the last. */
    bool (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t begin, int64_t end, void *ctx), void *ctx);
    /* Sub-ranges that may run at once, at least 1. */
    int64_t (*threads)(void);
} clipft_host;

#endif
