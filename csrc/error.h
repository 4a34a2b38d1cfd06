/* The first thing that went wrong in an op, and what kind of thing. Nothing is thrown before everything is freed.
 *
 * Torch's C ABI throws a RuntimeError with a text, whatever happened. So the kind goes before the text, as the name of the Python error
 * that fits it: "ValueError: clipft.<op>: <what>". Python raises that error without the name (clipft.ops.kernels.call). An error of no
 * other kind begins with "clipft.". */
#ifndef CLIPFT_ERROR_H
#define CLIPFT_ERROR_H

#include <stdbool.h>

typedef enum clipft_error_kind {
    CLIPFT_RUNTIME_ERROR,   /* torch, its threads or a device failed, or clipft has a bug */
    CLIPFT_TYPE_ERROR,      /* a dtype that does not fit */
    CLIPFT_VALUE_ERROR,     /* a shape, device or number that does not fit */
    CLIPFT_NOT_IMPLEMENTED, /* the kernels do not run on this device */
    CLIPFT_OUT_OF_MEMORY,
} clipft_error_kind;

typedef struct clipft_error {
    const char *op;
    clipft_error_kind kind;
    char text[512];
} clipft_error;

/* Records "clipft.<op>: <message>" unless an error is there already. Always false, so that a check can return it. */
__attribute__((format(printf, 3, 4))) bool clipft_fail(clipft_error *error, clipft_error_kind kind, const char *format, ...);

/* Throws the recorded error as torch does, or returns if there is none. Call last. */
void clipft_throw(const clipft_error *error, const char *file, int line);

#endif
