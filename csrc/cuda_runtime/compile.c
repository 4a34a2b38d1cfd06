#define _GNU_SOURCE /* dladdr */
#include "compile.h"

#include "../torch_abi.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Which NVRTC: one that is loaded, torch's (libcaffe2_nvrtc depends on it), or one of the system. The tests name their own. */
#ifdef CLIPFT_LIBNVRTC
static const char *const sonames[] = {CLIPFT_LIBNVRTC};
#else
static const char *const sonames[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
#endif
enum { SONAMES = sizeof sonames / sizeof *sonames };

/* What is compiled: <name>.cu with the headers that it may include. */
#define HEADERS "common.cuh", "lora.cuh", "args.h"
static const char *const headers[] = {HEADERS};
enum { HEADER_COUNT = sizeof headers / sizeof *headers, TEXTS = HEADER_COUNT + 1 };
enum { PATH_SIZE = 4096, OPTIONS = 2, OPTION_SIZE = 48, FILE_LIMIT = 1 << 20, CUBIN_LIMIT = 1 << 26, UNUSED_SECONDS = 90 * 24 * 3600 };

typedef struct unit {
    const char *name;
    const clipft_cuda_target_gpu *gpu;
    clipft_nvrtc_api nvrtc;
    int nvrtc_major, nvrtc_minor;
    char nvrtc_file[64]; /* size and time of the library: a patch release tells the version of those before it */
    char *text[TEXTS];   /* the headers, and then the source */
    char option[OPTIONS][OPTION_SIZE];
    char *problem;
    size_t problem_size;
} unit;

__attribute__((format(printf, 2, 3))) static bool fail(const unit *u, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(u->problem, u->problem_size, format, args);
    va_end(args);
    return false;
}

/* ---- files ---- */

/* The whole of a regular file and a zero, or NULL when it cannot be read, is empty or has more than `limit` bytes. Takes `file`. */
static char *read_open_file(int file, size_t limit, size_t *size)
{
    char *data = NULL;
    struct stat entry;
    bool ok = file >= 0 && fstat(file, &entry) == 0 && S_ISREG(entry.st_mode) && entry.st_size > 0 && (uint64_t)entry.st_size <= limit;
    if (ok) data = malloc((size_t)entry.st_size + 1);
    ok = ok && data;
    for (size_t done = 0; ok && done < (size_t)entry.st_size;) {
        const ssize_t n = read(file, data + done, (size_t)entry.st_size - done);
        if (n < 0 && errno == EINTR) continue;
        ok = n > 0;
        if (ok) done += (size_t)n;
    }
    if (ok) data[entry.st_size] = '\0', *size = (size_t)entry.st_size;
    if (file >= 0) close(file);
    if (!ok) free(data), data = NULL;
    return data;
}

static char *read_device_code(const unit *u, const char *folder, const char *file, size_t *size)
{
    char path[PATH_SIZE];
    const int n = snprintf(path, sizeof path, "%s/%s", folder, file);
    char *text = n > 0 && n < PATH_SIZE ? read_open_file(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), FILE_LIMIT, size) : NULL;
    if (!text) fail(u, "clipft's device code cannot be read: %s/%s; install clipft again", folder, file);
    return text;
}

static bool read_sources(unit *u, const char *folder)
{
    char source[64];
    size_t size;
    snprintf(source, sizeof source, "%s.cu", u->name);
    for (int k = 0; k < TEXTS; ++k)
        if (!(u->text[k] = read_device_code(u, folder, k < HEADER_COUNT ? headers[k] : source, &size))) return false;
    return true;
}

/* FNV-1a, also over the final zero of a text, so that no two lists of texts run into each other. */
static uint64_t hash(uint64_t state, const char *data, size_t size)
{
    for (size_t k = 0; k < size; ++k) state = (state ^ (uint8_t)data[k]) * 0x100000001b3U;
    return state;
}

static const uint64_t FNV_START = 0xcbf29ce484222325U;

bool clipft_cuda_check_device_code(const char *folder, char *problem, size_t problem_size)
{
#ifdef CLIPFT_CUDA_DIGEST
    const unit u = {.problem = problem, .problem_size = problem_size};
    static const char *const files[] = {
        HEADERS,
#define CUDA_FILE(name) #name ".cu",
#define CUDA_KERNEL(file, name, args)
#include "kernels.inc"
#undef CUDA_FILE
#undef CUDA_KERNEL
    };
    uint64_t digest = 0; /* as setup.py computes it */
    for (size_t k = 0; k < sizeof files / sizeof *files; ++k) {
        size_t size;
        char *text = read_device_code(&u, folder, files[k], &size);
        if (!text) return false;
        digest ^= hash(FNV_START, text, size + 1);
        free(text);
    }
    return digest == CLIPFT_CUDA_DIGEST ||
           fail(&u,
                "clipft's device code in %s is not what its C extension was compiled with; install clipft again, or in a source tree: "
                "python setup.py build_ext --inplace",
                folder);
#else
    (void)folder, (void)problem, (void)problem_size;
    return true;
#endif
}

/* ---- NVRTC ---- */

static void *open_nvrtc(void)
{
    void *library = NULL;
    char path[PATH_SIZE];
    for (int k = 0; k < SONAMES && !library; ++k) library = dlopen(sonames[k], RTLD_NOW | RTLD_NOLOAD);
#ifndef CLIPFT_LIBNVRTC
    if (!library && clipft_torch_library("libcaffe2_nvrtc.so", path, sizeof path)) library = dlopen(path, RTLD_NOW);
#else
    (void)path;
#endif
    for (int k = 0; k < SONAMES && !library; ++k) library = dlopen(sonames[k], RTLD_NOW);
    return library;
}

static void tell_nvrtc_file(unit *u)
{
    Dl_info info;
    struct stat entry;
    union {
        clipft_nvrtc_result (*function)(int *major, int *minor);
        void *object;
    } known = {u->nvrtc.nvrtcVersion};
    if (dladdr(known.object, &info) && info.dli_fname && stat(info.dli_fname, &entry) == 0)
        snprintf(u->nvrtc_file, sizeof u->nvrtc_file, "%lld bytes of %lld", (long long)entry.st_size, (long long)entry.st_mtime);
}

static bool resolve_nvrtc(unit *u)
{
    void *library = open_nvrtc(); /* stays for the life of the process, as torch keeps its own */
    const char *missing = NULL;
    if (!library)
        return fail(u,
                    "there is no NVRTC, which compiles the kernels (%s); a CUDA build of torch brings it, or pip install nvidia-cuda-nvrtc",
                    dlerror());
    union {
        void *object;
        void (*function)(void);
    } found;
#define RESOLVE(name, parameters)                                                                                                          \
    found.object = dlsym(library, #name);                                                                                                  \
    if (!found.object && !missing) missing = #name;                                                                                        \
    u->nvrtc.name = (clipft_nvrtc_result(*) parameters)found.function;
    CLIPFT_NVRTC_FUNCTIONS(RESOLVE)
#undef RESOLVE
    if (missing) return fail(u, "NVRTC is too old, it lacks %s", missing);
    tell_nvrtc_file(u);
    return !u->nvrtc.nvrtcVersion(&u->nvrtc_major, &u->nvrtc_minor) || fail(u, "NVRTC does not tell its version");
}

static bool check_supported(const unit *u)
{
    const int wanted = 10 * u->gpu->major + u->gpu->minor;
    int count = 0, first = 0, last = 0;
    bool known = false;
    int *archs = u->nvrtc.nvrtcGetNumSupportedArchs(&count) || count < 1 ? NULL : calloc((size_t)count, sizeof *archs);
    if (!archs || u->nvrtc.nvrtcGetSupportedArchs(archs)) {
        free(archs);
        return fail(u, "NVRTC does not tell which GPUs it compiles for");
    }
    first = archs[0], last = archs[count - 1];
    for (int k = 0; k < count; ++k) known |= archs[k] == wanted;
    free(archs);
    return known || fail(u, "NVRTC %d.%d does not compile for this GPU, sm_%d, only for sm_%d to sm_%d%s", u->nvrtc_major, u->nvrtc_minor,
                         wanted, first, last, wanted < first ? "; a torch for an older CUDA may bring an NVRTC that does" : "");
}

static char *compile(const unit *u, size_t *size)
{
    const char *options[OPTIONS];
    char file[64], *log = NULL, *image = NULL;
    nvrtcProgram program = NULL;
    size_t log_size = 0;
    for (int k = 0; k < OPTIONS; ++k) options[k] = u->option[k];
    snprintf(file, sizeof file, "%s.cu", u->name);
    if (u->nvrtc.nvrtcCreateProgram(&program, u->text[HEADER_COUNT], file, HEADER_COUNT, (const char *const *)u->text, headers)) {
        fail(u, "NVRTC %d.%d could not begin to compile %s", u->nvrtc_major, u->nvrtc_minor, file);
        goto done;
    }
    if (u->nvrtc.nvrtcCompileProgram(program, OPTIONS, options)) {
        if (!u->nvrtc.nvrtcGetProgramLogSize(program, &log_size) && log_size > 0 && (log = calloc(log_size + 1, 1)))
            u->nvrtc.nvrtcGetProgramLog(program, log);
        fail(u, "NVRTC %d.%d could not compile %s for sm_%d%d: %s", u->nvrtc_major, u->nvrtc_minor, file, u->gpu->major, u->gpu->minor,
             log ? log : "it does not say why");
        goto done;
    }
    if (u->nvrtc.nvrtcGetCUBINSize(program, size) || *size == 0 || *size > CUBIN_LIMIT || !(image = malloc(*size)) ||
        u->nvrtc.nvrtcGetCUBIN(program, image)) {
        fail(u, "NVRTC %d.%d compiled %s to nothing", u->nvrtc_major, u->nvrtc_minor, file);
        free(image), image = NULL;
    }
done:
    if (program) u->nvrtc.nvrtcDestroyProgram(&program);
    free(log);
    return image;
}

/* ---- the cache on disk ---- */

static const char magic[8] = "clipft1";

typedef struct cache_header {
    char magic[8];
    uint64_t size, checksum; /* of the machine code that follows */
} cache_header;

/* All that decides on the machine code; two states make 128 bits. */
static uint64_t key(const unit *u, uint64_t state)
{
    char versions[160];
    snprintf(versions, sizeof versions, "NVRTC %d.%d, %s, driver %d", u->nvrtc_major, u->nvrtc_minor, u->nvrtc_file, u->gpu->driver);
    state = hash(state, versions, strlen(versions) + 1);
    for (int k = 0; k < OPTIONS; ++k) state = hash(state, u->option[k], strlen(u->option[k]) + 1);
    for (int k = 0; k < TEXTS; ++k)
        if (u->text[k]) state = hash(state, u->text[k], strlen(u->text[k]) + 1);
    return state;
}

/* Makes the folder of `path` and those above it; whether that worked shows when the file is opened. */
static void make_folders(const char *path)
{
    char part[PATH_SIZE];
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(part, sizeof part, "%.*s", (int)(slash - path), path);
        mkdir(part, 0700);
    }
}

/* Where the machine code is kept; false where there is no home. */
static bool cache_path(const unit *u, char *path)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    const bool own = cache && cache[0] == '/';
    if (!own && (!home || home[0] != '/')) return false;
    const int n =
        snprintf(path, PATH_SIZE, "%s%s/clipft/cuda/%s-sm_%d%d-%016llx%016llx.cubin", own ? cache : home, own ? "" : "/.cache", u->name,
                 u->gpu->major, u->gpu->minor, (unsigned long long)key(u, FNV_START), (unsigned long long)key(u, 0x9e3779b97f4a7c15U));
    return n > 0 && n < PATH_SIZE;
}

/* A regular file of this user's that nobody else may write: what runs on the GPU comes from nowhere else. */
static bool is_own(int file)
{
    struct stat entry;
    return fstat(file, &entry) == 0 && S_ISREG(entry.st_mode) && entry.st_uid == geteuid() && !(entry.st_mode & (S_IWGRP | S_IWOTH));
}

/* Its time becomes that of its last use: see cache_prune. */
static char *cache_read(const char *path)
{
    size_t size = 0;
    cache_header header;
    char *data = NULL;
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0) return NULL;
    if (is_own(file) && futimens(file, NULL) == 0)
        data = read_open_file(file, CUBIN_LIMIT + sizeof header, &size);
    else
        close(file);
    if (!data || size < sizeof header) goto bad;
    memcpy(&header, data, sizeof header);
    if (memcmp(header.magic, magic, sizeof magic) != 0 || header.size != size - sizeof header ||
        header.checksum != hash(0, data + sizeof header, header.size))
        goto bad;
    memmove(data, data + sizeof header, header.size);
    return data;
bad:
    free(data);
    return NULL;
}

static bool write_all(int file, const void *data, size_t size)
{
    for (const char *p = data; size > 0;) {
        const ssize_t n = write(file, p, size);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        p += n, size -= (size_t)n;
    }
    return true;
}

/* Removes what nobody has used for long: of drivers, compilers and sources before these, and of processes that were killed as they wrote.
 */
static void cache_prune(const char *path)
{
    char folder[PATH_SIZE];
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(path, '/') - path), path);
    DIR *entries = opendir(folder);
    const time_t now = time(NULL);
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        struct stat status;
        const char *end = strrchr(entry->d_name, '.');
        const bool ours = end && strstr(entry->d_name, ".cubin") && (strcmp(end, ".cubin") == 0 || strcmp(end, ".tmp") == 0);
        if (ours && fstatat(dirfd(entries), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(status.st_mode) &&
            status.st_uid == geteuid() && now - status.st_mtime > UNUSED_SECONDS)
            unlinkat(dirfd(entries), entry->d_name, 0);
    }
    if (entries) closedir(entries);
}

static void cache_write(const char *path, const char *image, size_t size)
{
    static atomic_int counter;
    char temporary[PATH_SIZE + 48];
    cache_header header = {.size = size, .checksum = hash(0, image, size)};
    memcpy(header.magic, magic, sizeof magic);
    snprintf(temporary, sizeof temporary, "%s.%ld.%d.tmp", path, (long)getpid(), atomic_fetch_add(&counter, 1));
    make_folders(path);
    const int file = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0) return;
    const bool whole = write_all(file, &header, sizeof header) && write_all(file, image, size);
    if (close(file) != 0 || !whole || rename(temporary, path) != 0) unlink(temporary);
    cache_prune(path);
}

/* ---- all of it ---- */

char *clipft_cuda_cubin(const char *folder, const char *name, const clipft_cuda_target_gpu *gpu, char *problem, size_t problem_size)
{
    unit u = {.name = name, .gpu = gpu, .problem = problem, .problem_size = problem_size};
    char path[PATH_SIZE], *image = NULL;
    size_t size = 0;
    snprintf(u.option[0], OPTION_SIZE, "--gpu-architecture=sm_%d%d", gpu->major, gpu->minor);
    snprintf(u.option[1], OPTION_SIZE, "--std=c++17");
    if (!read_sources(&u, folder) || !resolve_nvrtc(&u) || !check_supported(&u)) goto done;
    const bool cached = cache_path(&u, path);
    if (cached) image = cache_read(path);
    if (image) goto done;
    image = compile(&u, &size);
    if (image && cached) cache_write(path, image, size);
done:
    for (int k = 0; k < TEXTS; ++k) free(u.text[k]);
    return image;
}
