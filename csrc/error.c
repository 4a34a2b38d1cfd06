#include "error.h"

#include "torch_abi.h"

#include <stdarg.h>
#include <stdio.h>

bool clipft_fail(clipft_error *error, clipft_error_kind kind, const char *format, ...)
{
    if (error->text[0]) return false;
    error->kind = kind;
    const int n = snprintf(error->text, sizeof error->text, "clipft.%s: ", error->op);
    va_list args;
    va_start(args, format);
    vsnprintf(error->text + n, sizeof error->text - (size_t)n, format, args);
    va_end(args);
    return false;
}

void clipft_throw(const clipft_error *error, const char *file, int line)
{
    static const char *const names[] = {[CLIPFT_RUNTIME_ERROR] = "",
                                        [CLIPFT_TYPE_ERROR] = "TypeError: ",
                                        [CLIPFT_VALUE_ERROR] = "ValueError: ",
                                        [CLIPFT_NOT_IMPLEMENTED] = "NotImplementedError: ",
                                        [CLIPFT_OUT_OF_MEMORY] = "OutOfMemoryError: "};
    char message[sizeof error->text + 32];
    if (!error->text[0]) return;
    snprintf(message, sizeof message, "%s%s", names[error->kind], error->text);
    clipft_torch.aoti_torch_check(false, error->op, file, (uint32_t)line, message);
}
