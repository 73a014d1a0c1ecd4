"""Runs the host's side of Triton's launches where there is no GPU.

Everything is real but the driver: Triton specializes and compiles for the architecture that is named, and the launcher
it generates in C takes the arguments apart. That launcher and the executor of programs are given a library of empty
functions in place of libcuda and cuBLASLt, so it says what it was asked to launch and returns.
"""

import ctypes
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.build import compile_module_from_src

from bench.compiled import SHARED_MEMORY
from fastmeta import _extension

LIBRARY = "libfastmeta_no_cuda.so"
_SOURCE = r"""
#include <cuda.h>
#include <string.h>
static unsigned long long count;
static unsigned last[5]; /* grid, threads, shared memory */
static unsigned long long values[64];
static int wanted; /* parameters to keep, of eight bytes each */
unsigned long long fastmeta_launches(unsigned *out) { memcpy(out, last, sizeof last); return count; }
unsigned long long *fastmeta_parameters(int count) { wanted = count; return values; }
/* cuBLASLt: one object stands for all, every product is to be had and takes no time. */
static int object;
static unsigned long long multiplied;
unsigned long long fastmeta_products(void) { return multiplied; }
static int give(void **out) { *out = &object; return 0; }
int cublasLtCreate(void **out) { return give(out); }
int cublasLtMatmulDescCreate(void **out, int compute, int scale) { return give(out); }
int cublasLtMatrixLayoutCreate(void **out, int type, size_t rows, size_t columns, long long leading) {
  return give(out);
}
int cublasLtMatmulPreferenceCreate(void **out) { return give(out); }
#define NOTHING(name) int name() { return 0; }
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, void *results, int *returned) {
  *returned = 1;
  return 0;
}
int cublasLtMatmul() { ++multiplied; return 0; }
static CUresult keep(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, void **arguments) {
  unsigned now[5] = {x, y, z, threads, shared};
  memcpy(last, now, sizeof last);
  for (int i = 0; i < wanted; ++i) memcpy(values + i, arguments[i], 8);
  ++count;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void **arguments, void **extra) {
  keep(x, y, z, block_x, shared, arguments);
  return f ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
  return keep(c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->sharedMemBytes, arguments);
}
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error ? "no kernel" : "no error";
  return CUDA_SUCCESS;
}
"""


class Launched(NamedTuple):
    """The last launch that reached the driver, and how many did."""

    number: int
    grid: tuple[int, ...]
    threads: int
    shared: int


def _compile(sources: list[Path], out: Path, *flags: str, library: bool = False) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("a C compiler is needed, as for Triton itself")
    includes = [f"-I{folder}" for folder in nvidia.include_dirs]
    linked = [f"-L{out.parent}", f"-l:{LIBRARY}", f"-Wl,-rpath,{out.parent}"] if library else []
    command = [compiler, "-shared", "-fPIC", "-O2", *includes, *flags, *map(str, sources), *linked, "-o", str(out)]
    subprocess.run(command, check=True)


@cache
def _library() -> tuple[Path, ctypes.CDLL]:
    folder = Path(tempfile.mkdtemp(prefix="fastmeta-no-cuda-"))
    source, library = folder / "no_cuda.c", folder / LIBRARY
    source.write_text(_SOURCE)
    _compile([source], library, f"-Wl,-soname,{LIBRARY}")
    return folder, ctypes.CDLL(str(library))  # loaded: the launchers find it by its name


def _ask(name: str, kind: Any, *arguments: Any) -> Any:
    function = getattr(_library()[1], name)
    function.restype = kind
    return function(*arguments)


def launched() -> Launched:
    """What has reached the driver."""
    last = (ctypes.c_uint * 5)()
    count = _ask("fastmeta_launches", ctypes.c_ulonglong, last)
    return Launched(count, tuple(last[:3]), last[3], last[4])


def products() -> int:
    """How many matrix products have reached cuBLASLt."""
    return _ask("fastmeta_products", ctypes.c_ulonglong)


def parameters(count: int) -> Any:
    """Where the driver keeps this many parameters of each launch from now on, eight bytes of each."""
    return _ask("fastmeta_parameters", ctypes.POINTER(ctypes.c_ulonglong), count)


def _launcher_of_triton() -> Any:
    """Triton's launcher of every kernel (3.7 and later), linked with the empty functions."""
    folder = _library()[0]
    source = (Path(nvidia.__file__).parent / "driver.c").read_text().replace("libcuda.so.1", LIBRARY)
    called = set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", source)) - set(re.findall(r"\bcu\w+", _SOURCE))
    stubs = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(called))
    (folder / "launcher.c").write_text(source)
    (folder / "stubs.c").write_text(stubs)
    module = folder / "cuda_utils.so"
    _compile([folder / "launcher.c", folder / "stubs.c"], module, f"-I{sysconfig.get_path('include')}", library=True)
    loader = ExtensionFileLoader("cuda_utils", str(module))
    loaded = module_from_spec(ModuleSpec("cuda_utils", loader, origin=str(module)))
    loader.exec_module(loaded)
    for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
        setattr(nvidia, name, getattr(loaded, name))
    return loaded


class _LauncherOfOneKernel(nvidia.CudaLauncher):
    """Triton 3.6 generates a launcher for each kernel's types; it is linked with the empty functions."""

    def __init__(self, src: Any, metadata: Any) -> None:
        signature = dict(src.signature.items())
        source = nvidia.make_launcher({}, signature, None).replace('"libcuda.so.1"', f'"{LIBRARY}"')
        module = compile_module_from_src(
            src=source,
            name="__triton_launcher",
            library_dirs=[str(_library()[0])],
            include_dirs=nvidia.include_dirs,
            libraries=[LIBRARY],
        )
        self.launch = module.launch
        scratch = (f"{kind}_scratch_{what}" for kind in ("global", "profile") for what in ("size", "align"))
        for name in ("num_ctas", "launch_cooperative_grid", "launch_pdl", *scratch):
            setattr(self, name, getattr(metadata, name))


_GENERATES_LAUNCHERS = hasattr(nvidia, "make_launcher")


class _Utils:
    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        if not _GENERATES_LAUNCHERS:
            module = _launcher_of_triton()
            self.launch = module.launch
            self.build_signature_metadata = module.build_signature_metadata

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.architecture], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass


class FakeDriver(nvidia.CudaDriver):
    """A driver of one GPU that is not there.

    Args:
        architecture: 80, 90 or 100.
    """

    def __init__(self, architecture: int = 90) -> None:
        self.architecture = architecture
        self.utils = _Utils(architecture)
        self.launcher_cls = _LauncherOfOneKernel if _GENERATES_LAUNCHERS else nvidia.CudaLauncher
        self.get_current_device: Callable[[], int] = lambda: 0
        self.set_current_device: Callable[[int], None] = lambda device: None
        self.get_current_stream: Callable[[int], int] = lambda device: 0
        self.get_device_capability: Callable[[int], tuple[int, int]] = lambda device: divmod(architecture, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def activate(architecture: int = 90) -> None:
    """Have Triton launch on the GPU that is not there, for the rest of the process."""
    library = str(_library()[0] / LIBRARY)
    _extension._C.use_driver(library)
    _extension._C.use_cublaslt(library)
    driver.set_active(FakeDriver(architecture))
