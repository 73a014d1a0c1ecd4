"""Where a result was measured: the machine, and what of fastmeta is installed on it.

``python -m bench.environment --out FILE`` is the phase ``environment`` of ``python -m bench gpu``; it fails where the
Triton kernels cannot be imported.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import fastmeta
from bench import choices, files
from fastmeta import _extension

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("backpack-for-pytorch", "curvlinops-for-pytorch", "liger-kernel")
PACKAGES = ("triton", "torchvision", "numpy", "pytest", "pytest-xdist")
_VECTOR_FLAGS = re.compile(r"^(avx|amx|fma|f16c|sve|asimd|bf16|i8mm)")
_QUERY = "driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))  # of several processors the first
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def machine_name() -> str:
    """A folder name for this machine's results."""
    return files.folder_name(f"{cpu_name()} {torch.get_num_threads()} threads")


def output_of(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
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


def implementations(device: str) -> dict[str, list[str]]:
    """Which implementations the operators have on a device."""
    modules = {name: import_module(f"fastmeta.ops.{stem}") for name, stem in choices.STEMS.items()}
    found = {name: getattr(module, "OPERATOR", None) for name, module in modules.items()}
    return {name: list(operator.implementations(device)) for name, operator in found.items() if operator}


def describe() -> dict[str, Any]:
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    changed = output_of("git", "status", "--porcelain")
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpu_family": info.get("cpu family"),
        "cpu_model": info.get("model"),
        "cores": os.cpu_count(),
        "vector_instructions": sorted(flag for flag in flags if _VECTOR_FLAGS.match(flag)),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmeta": fastmeta.__version__,
        "fastmeta_build": _extension.build_info(),
        "peers": {package: _version(package) for package in PEERS},
        "packages": {package: _version(package) for package in PACKAGES},
        "git_commit": output_of("git", "rev-parse", "HEAD"),
        "git_changed_files": None if changed is None else len(changed.splitlines()),
        "implementations": implementations("cuda" if torch.cuda.is_available() else "cpu"),
        "cpp_missing": _extension.REASON,
        "cuda_missing": _extension.CUDA_REASON,
        "triton_missing": _extension.TRITON_REASON,
    }
    return found | ({"gpu": gpu()} if torch.cuda.is_available() else {})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    files.write(parser.parse_args(arguments).out, describe())
    import_module("fastmeta.triton_kernels.label_gradient")
    return 0


if __name__ == "__main__":
    sys.exit(main())
