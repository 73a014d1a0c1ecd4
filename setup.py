"""Builds fastmeta._C, the CPU kernels on LibTorch's stable ABI, and with nvcc the CUDA kernels in a library beside it.

fastmeta._C_lists is built on torch's C++ API and serves the torch it was built for alone (csrc/lists/module.cpp).

FASTMETA_CUDA=1 builds the CUDA kernels for a torch without CUDA as well, FASTMETA_CUDA=0 never builds them.
"""

import os
import sys
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402


class BuildKernels(BuildExtension):
    """Builds the extension, then the CUDA library into the same folder."""

    def run(self) -> None:
        """Build both."""
        super().run()
        if build_cuda.wanted():
            build_cuda.build(self.cuda_library())

    def get_outputs(self) -> list[str]:
        """What an installation records."""
        library = self.cuda_library()
        return [*super().get_outputs(), *([str(library)] if build_cuda.wanted() else [])]

    def cuda_library(self) -> Path:
        """The library's place: in the source tree for an editable installation."""
        return Path(self.get_ext_fullpath("fastmeta._C")).with_name("_C_cuda.so").absolute()


def sources(*patterns: str) -> list[str]:
    """Source files under csrc/, relative to the root and in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# A shared library with these and no debug information.
COMPILE = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    f'-DFASTMETA_BUILT_FOR_TORCH="{torch.__version__}"',
]
LINK = ["-Wl,-s"] if os.name == "posix" else []

setup(
    packages=[*find_packages(include=["fastmeta", "fastmeta.*"]), "fastmeta.triton_kernels"],
    ext_modules=[
        CppExtension(
            "fastmeta._C",
            sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/entry/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            depends=sources("csrc/*.h", "csrc/cpu/*.h", "csrc/entry/*.h"),
            extra_compile_args={
                "cxx": [
                    *COMPILE,
                    "-ffp-contract=fast",
                    "-fno-math-errno",
                    "-fno-trapping-math",
                    build_cuda.STABLE_ABI,
                ]
            },
            libraries=["dl"] if os.name == "posix" else [],
            extra_link_args=LINK,
        ),
        CppExtension(
            "fastmeta._C_lists",
            ["csrc/lists/module.cpp"],
            include_dirs=[str(ROOT / "csrc")],
            depends=["csrc/list_tensor.h"],
            extra_compile_args={"cxx": COMPILE},
            extra_link_args=LINK,
        ),
    ],
    cmdclass={"build_ext": BuildKernels},
)
