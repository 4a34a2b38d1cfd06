/* An emulated NVRTC: checks what it is asked and makes "emulated <file>" of it. EMULATED_NVRTC_FAILS=1 makes every compilation fail. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct _nvrtcProgram {
    char code[80];
};

static int compilations;

int emulated_compilations(void) { return compilations; }

int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
int nvrtcGetNumSupportedArchs(int *count) { return *count = 4, 0; }
int nvrtcGetSupportedArchs(int *archs) { return archs[0] = 75, archs[1] = 80, archs[2] = 90, archs[3] = 100, 0; }

int nvrtcCreateProgram(struct _nvrtcProgram **program, const char *source, const char *name, int headers, const char *const *contents,
                       const char *const *names)
{
    const int ok = headers == 3 && !strcmp(names[0], "common.cuh") && strstr(contents[0], "#define KERNEL(") &&
                   !strcmp(names[1], "lora.cuh") && strstr(contents[1], "common.cuh") && !strcmp(names[2], "args.h") &&
                   strstr(contents[2], "CLIPFT_GLOBAL") && strstr(source, "KERNEL(") && strstr(name, ".cu");
    *program = calloc(1, sizeof **program);
    if (ok) snprintf((*program)->code, sizeof(*program)->code, "emulated %.*s", (int)(strlen(name) - 3), name);
    return ok ? 0 : 3;
}

int nvrtcCompileProgram(struct _nvrtcProgram *program, int options, const char *const *option)
{
    (void)program;
    ++compilations;
    return getenv("EMULATED_NVRTC_FAILS") || options != 2 || strncmp(option[0], "--gpu-architecture=sm_", 22) ||
                   strcmp(option[1], "--std=c++17")
               ? 6
               : 0;
}

static const char log_text[] = "contrastive.cu(1): error: as the test wants it";

int nvrtcGetProgramLogSize(struct _nvrtcProgram *program, size_t *size) { return (void)program, *size = sizeof log_text, 0; }
int nvrtcGetProgramLog(struct _nvrtcProgram *program, char *log) { return (void)program, strcpy(log, log_text), 0; }
int nvrtcGetCUBINSize(struct _nvrtcProgram *program, size_t *size) { return *size = strlen(program->code) + 1, 0; }
int nvrtcGetCUBIN(struct _nvrtcProgram *program, char *image) { return strcpy(image, program->code), 0; }
int nvrtcDestroyProgram(struct _nvrtcProgram **program) { return free(*program), *program = NULL, 0; }
