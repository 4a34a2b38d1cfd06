/* clipft._C: importing it finds LibTorch in the process and registers the ops under torch.ops.clipft. The module itself tells which
 * kernels run, and trims the heap.
 *
 * It holds no Python object. The registration lives as long as the process, as torch's own do, and happens once however often the module is
 * imported. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cuda_runtime/driver.h"
#include "dispatch.h"
#include "ops/ops.h"

#include <stdlib.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#if defined(__APPLE__)
#define LIBTORCH "libtorch_cpu.dylib"
#else
#define LIBTORCH "libtorch_cpu.so"
#endif

/* torch, or NULL with an ImportError. */
static PyObject *import_torch(void)
{
    PyObject *torch = PyImport_ImportModule("torch");
    if (!torch && !PyErr_ExceptionMatches(PyExc_ImportError) && !PyErr_ExceptionMatches(PyExc_OSError)) return NULL; /* Ctrl-C, say */
    if (!torch) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyErr_Format(PyExc_ImportError,
                     "clipft needs torch >= " CLIPFT_TORCH_FLOOR
                     ", which could not be imported (%S); pip install 'torch>=" CLIPFT_TORCH_FLOOR "'",
                     value ? value : Py_None);
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
    }
    return torch;
}

/* Path of the libtorch that `import torch` loaded, or NULL with an error. */
static char *find_libtorch(PyObject *torch)
{
    PyObject *file = NULL, *path = NULL;
    char *result = NULL;
    file = PyObject_GetAttrString(torch, "__file__");
    if (!file) goto done;
    path = PyUnicode_AsUTF8String(file);
    if (!path) goto done;
    const char *init = PyBytes_AsString(path);
    const char *slash = init ? strrchr(init, '/') : NULL;
    const size_t folder = slash ? (size_t)(slash - init) : 0;
    result = malloc(folder + sizeof "/lib/" LIBTORCH);
    if (!result) {
        PyErr_NoMemory();
        goto done;
    }
    if (init) memcpy(result, init, folder);
    memcpy(result + folder, "/lib/" LIBTORCH, sizeof "/lib/" LIBTORCH);
done:
    Py_XDECREF(file);
    Py_XDECREF(path);
    return result;
}

/* Says what to do about a torch that lacks something. */
static void refuse_torch(PyObject *torch, const char *missing)
{
    PyObject *version = PyObject_GetAttrString(torch, "__version__"), *text = version ? PyObject_Str(version) : NULL,
             *bytes = text ? PyUnicode_AsUTF8String(text) : NULL;
    const char *installed = bytes ? PyBytes_AsString(bytes) : "of no version";
    char *end = NULL;
    const long major = strtol(installed, &end, 10), minor = *end == '.' ? strtol(end + 1, NULL, 10) : 0;
    const bool old = major < CLIPFT_TORCH_FLOOR_MAJOR || (major == CLIPFT_TORCH_FLOOR_MAJOR && minor < CLIPFT_TORCH_FLOOR_MINOR);
    PyErr_Clear();
    if (old)
        PyErr_Format(PyExc_ImportError,
                     "clipft needs torch >= " CLIPFT_TORCH_FLOOR ", the torch that is installed (%s) is too old: it lacks %s; "
                     "pip install 'torch>=" CLIPFT_TORCH_FLOOR "'",
                     installed, missing);
    else
        PyErr_Format(PyExc_ImportError,
                     "the torch that is installed (%s) is too new for this clipft, or a build of another kind: it lacks %s; "
                     "pip install -U clipft, or an older torch (>= " CLIPFT_TORCH_FLOOR ")",
                     installed, missing);
    Py_XDECREF(version);
    Py_XDECREF(text);
    Py_XDECREF(bytes);
}

static bool resolve_torch(void)
{
    PyObject *torch = import_torch();
    char *path = torch ? find_libtorch(torch) : NULL;
    const char *missing = path ? clipft_torch_resolve(path) : NULL;
    if (missing) refuse_torch(torch, missing == path ? "its library " LIBTORCH : missing);
    const bool ok = path && !missing;
    free(path);
    Py_XDECREF(torch);
    return ok;
}

static bool register_ops(void)
{
    /* torch keeps these for the life of the process. */
    TorchLibraryHandle definitions = NULL, cpu = NULL, cuda = NULL;
    AOTITorchError bad = clipft_torch.aoti_torch_library_init_def("clipft", __FILE__, __LINE__, &definitions);
    bad = bad ? bad : clipft_ops_define(definitions);
    bad = bad ? bad : clipft_torch.aoti_torch_library_init_impl("clipft", "CPU", __FILE__, __LINE__, &cpu);
#define OP(name, args, results) bad = bad ? bad : clipft_torch.torch_library_impl(cpu, #name, clipft_op_##name, CLIPFT_TORCH_BUILD_VERSION);
#include "ops/ops.inc"
#undef OP
    if (clipft_torch_has_cuda()) {
        bad = bad ? bad : clipft_torch.aoti_torch_library_init_impl("clipft", "CUDA", __FILE__, __LINE__, &cuda);
#define OP_CUDA(name) bad = bad ? bad : clipft_torch.torch_library_impl(cuda, #name, clipft_cuda_##name, CLIPFT_TORCH_BUILD_VERSION);
#include "ops/ops_cuda.inc"
#undef OP_CUDA
    }
    if (bad) PyErr_SetString(PyExc_ImportError, "clipft could not register its ops with torch (is another library named clipft loaded?)");
    return !bad;
}

/* The tier of that name if this machine has it, or -1 with `error` set. */
static int usable_isa(const char *name, PyObject *error)
{
    for (int isa = 0; isa < CLIPFT_ISA_COUNT; ++isa) {
        if (strcmp(name, clipft_isa_name((clipft_isa)isa)) != 0) continue;
        if (clipft_dispatch_can((clipft_isa)isa)) return isa;
        PyErr_Format(error, "clipft: this machine does not support the instruction set %s; the best it has is %s", name,
                     clipft_isa_name(clipft_dispatch_best()));
        return -1;
    }
    PyErr_Format(
        error,
        "clipft: unknown instruction set \"%s\"; expected ref, neon, neon_dot, neon_i8mm, avx2, avx_vnni, avx512, avx512_vnni or amx",
        name);
    return -1;
}

static PyObject *py_isa(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_FromString(clipft_isa_name(clipft_dispatch_isa()));
}

static PyObject *py_set_isa(PyObject *self, PyObject *args)
{
    const char *name;
    (void)self;
    if (!PyArg_ParseTuple(args, "s:set_isa", &name)) return NULL;
    const int isa = usable_isa(name, PyExc_ValueError);
    if (isa < 0) return NULL;
    clipft_dispatch((clipft_isa)isa);
    Py_RETURN_NONE;
}

static PyObject *py_isas(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *list = PyList_New(0);
    for (int isa = 0; list && isa < CLIPFT_ISA_COUNT; ++isa) {
        if (!clipft_dispatch_can((clipft_isa)isa)) continue;
        PyObject *name = PyUnicode_FromString(clipft_isa_name((clipft_isa)isa));
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *py_kernels(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *dict = PyDict_New();
    for (int slot = 0; dict && slot < CLIPFT_SLOT_COUNT; ++slot) {
        clipft_isa isa;
        const char *name = clipft_dispatch_slot(slot, &isa);
        PyObject *value = PyUnicode_FromString(clipft_isa_name(isa));
        if (!value || PyDict_SetItemString(dict, name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *py_cuda_problem(PyObject *self, PyObject *args)
{
    int device;
    const char *problem, *name = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "i|s:cuda_problem", &device, &name)) return NULL;
    const clipft_cuda_file file = name ? clipft_cuda_file_named(name) : CLIPFT_CUDA_FILES;
    if (name && file == CLIPFT_CUDA_FILES) return PyErr_Format(PyExc_ValueError, "cuda_problem: there is no %s.cu", name);
    Py_BEGIN_ALLOW_THREADS /* it may compile */
        problem = clipft_cuda_problem(device, file);
    Py_END_ALLOW_THREADS if (problem) return PyUnicode_DecodeUTF8(problem, (Py_ssize_t)strlen(problem), "replace");
    Py_RETURN_NONE;
}

/* What was freed goes back to the system: glibc keeps what lies below the last block in use. */
static PyObject *py_trim_heap(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
#ifdef __GLIBC__
    PyThreadState *thread = PyEval_SaveThread();
    malloc_trim(0);
    PyEval_RestoreThread(thread);
#endif
    Py_RETURN_NONE;
}

static int module_exec(PyObject *module)
{
    static bool registered;
    (void)module;
    if (registered) return 0;
    const char *wanted = getenv("CLIPFT_ISA");
    const int isa = wanted && *wanted ? usable_isa(wanted, PyExc_ImportError) : (int)clipft_dispatch_best();
    if (isa < 0) return -1;
    clipft_dispatch((clipft_isa)isa);
    if (!resolve_torch() || !register_ops()) return -1;
    registered = true;
    return 0;
}

static PyMethodDef methods[] = {
    {"isa", py_isa, METH_NOARGS, "isa() -> str: the instruction set whose kernels run; CLIPFT_ISA lowers it."},
    {"isas", py_isas, METH_NOARGS, "isas() -> list[str]: the instruction sets that this machine supports, weakest first."},
    {"set_isa", py_set_isa, METH_VARARGS, "set_isa(name): use another instruction set. For tests; not while an op runs."},
    {"kernels", py_kernels, METH_NOARGS, "kernels() -> dict[str, str]: for each kernel the instruction set it runs on."},
    {"trim_heap", py_trim_heap, METH_NOARGS, "trim_heap(): give memory that was freed back to the system, where its C library can."},
    {"cuda_problem", py_cuda_problem, METH_VARARGS,
     "cuda_problem(index, name=None) -> str | None: None if that GPU can run the kernels of cuda/<name>.cu, or all, which are then "
     "compiled "
     "and loaded, else why it cannot."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "clipft._C", .m_doc = "Registers torch.ops.clipft and tells which kernels run.",
    .m_methods = methods,  .m_slots = slots,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
