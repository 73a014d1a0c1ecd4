"""Builds fastmeta._C: the CPU kernels on LibTorch's stable ABI and a small pybind11 module beside them."""

import os
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
# One source for torch 2.11 and later: nothing newer than the 2.11 stable ABI may be used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def sources(*patterns: str) -> list[str]:
    """Source files under csrc/, relative to the root and in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


setup(
    packages=[*find_packages(include=["fastmeta", "fastmeta.*"]), "fastmeta.triton_kernels"],
    ext_modules=[
        CppExtension(
            "fastmeta._C",
            sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            depends=sources("csrc/*.h", "csrc/cpu/*.h"),
            extra_compile_args={
                "cxx": [
                    "-O3",
                    "-g0",
                    "-std=c++20",
                    "-fvisibility=hidden",
                    "-ffp-contract=fast",
                    "-fno-math-errno",
                    "-fno-trapping-math",
                    STABLE_ABI,
                    f'-DFASTMETA_BUILT_FOR_TORCH="{torch.__version__}"',
                ]
            },
            extra_link_args=["-Wl,-s"] if os.name == "posix" else [],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
