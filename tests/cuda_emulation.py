"""The CUDA kernels compiled for the CPU (csrc/cuda/emulator.h), built once for each state of their sources."""

import os
import shutil
import warnings

import build_cuda

VARIABLE = "FASTMETA_CUDA_EMULATION"


def enable() -> None:
    """Name the library in the environment, where fastmeta looks for it when it is imported.

    Without a compiler, or with sources that do not compile, the tests of these kernels skip, or fail where
    FASTMETA_REQUIRE_CUDA=1; test_build_cuda.py fails in the second case anyway.
    """
    if VARIABLE in os.environ or shutil.which(build_cuda.compiler()) is None:
        return
    try:
        os.environ[VARIABLE] = str(build_cuda.build_emulated())
    except RuntimeError as error:
        warnings.warn(f"the CUDA emulation does not build: {error}", RuntimeWarning, stacklevel=2)
