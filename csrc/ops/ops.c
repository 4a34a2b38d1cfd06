#include "ops.h"

#include <stdio.h>

/* Lists begin with a separator too many; one result without a name stands without brackets. */
enum { SEPARATOR = sizeof ", " - 1 };

static AOTITorchError define(TorchLibraryHandle library, const char *name, const char *args, const char *results)
{
    char schema[1024];
    const bool named = results[0] == ',';
    const int n = snprintf(schema, sizeof schema, named ? "%s(%s) -> (%s)" : "%s(%s) -> %s", name, args + SEPARATOR,
                           named ? results + SEPARATOR : results);
    return n < 0 || (size_t)n >= sizeof schema || clipft_torch.aoti_torch_library_def(library, schema);
}

AOTITorchError clipft_ops_define(TorchLibraryHandle library)
{
    AOTITorchError bad = 0;
#define ARG(type, arg) ", " #type " " #arg
#define ARG_OR(type, arg, otherwise) ", " #type " " #arg "=" #otherwise
#define RESULT(type, result) ", " #type " " #result
#define RETURNS(type) #type
#define OP(name, args, results) bad = bad ? bad : define(library, #name, args, results);
#include "ops.inc"
#undef OP
#undef ARG
#undef ARG_OR
#undef RESULT
#undef RETURNS
    return bad;
}
