/* The table of micro-kernels in use: the reference everywhere, then the best row of kernels.inc that this CPU may run. */
#ifndef CLIPFT_DISPATCH_H
#define CLIPFT_DISPATCH_H

#include "cpu.h"
#include "kernels/table.h"

enum { CLIPFT_SLOT_COUNT = sizeof(clipft_kernels) / sizeof(void *) }; /* every slot is a pointer */

/* Whether kernels of that tier are here and this CPU may run them; the best such tier. */
bool clipft_dispatch_can(clipft_isa isa);
clipft_isa clipft_dispatch_best(void);

/* The tier in use. Chosen at start; clipft_dispatch lowers or raises it for tests and must not run beside an op. */
clipft_isa clipft_dispatch_isa(void);
void clipft_dispatch(clipft_isa limit);

/* Whether the losses' products are kernels/common/gemm.h's: where that was measured to beat torch's, which is AMD with AVX-512, by 1.15
 * to 1.2. */
bool clipft_dispatch_own_gemm(void);

/* For each slot, its name, family and all, and the tier of the kernel in use. */
const char *clipft_dispatch_slot(int slot, clipft_isa *isa);

#endif
