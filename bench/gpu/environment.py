"""The phase ``environment``: the machine, and what of fastmeta is installed on it."""

import argparse
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.gpu import files
from bench.ops import STEMS
from fastmeta import _extension

PACKAGES = ("triton", "torchvision", "liger-kernel", "numpy", "pytest", "pytest-xdist")
_QUERY = "driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def output_of(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None and not Path(command[0]).is_file():
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, Any]:
    """The current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    nvcc = output_of("nvcc", "--version") or output_of("/usr/local/cuda/bin/nvcc", "--version")
    state = output_of("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
        "nvcc": None if nvcc is None else nvcc.splitlines()[-1],
        "nvidia_smi": None if state is None else dict(zip(_QUERY.split(","), state.split(", "), strict=False)),
    }


def fastmeta_installed() -> dict[str, Any]:
    """Which implementations the operators have on CUDA, and why others are missing."""
    operators = {name: import_module(f"fastmeta.ops.{stem}") for name, stem in STEMS.items()}
    return {
        "implementations": {
            name: module.OPERATOR.implementations("cuda")
            for name, module in operators.items()
            if hasattr(module, "OPERATOR")
        },
        "cpp_missing": _extension.REASON,
        "cuda_missing": _extension.CUDA_REASON,
        "triton_missing": _extension.TRITON_REASON,
    }


def describe() -> dict[str, Any]:
    found = environment.describe() | {"packages": {package: _version(package) for package in PACKAGES}}
    found |= fastmeta_installed()
    return found | ({"gpu": gpu()} if torch.cuda.is_available() else {})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    files.write(parser.parse_args(arguments).out, describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
