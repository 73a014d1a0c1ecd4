"""Where a result was measured."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastmeta
from fastmeta import _extension

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("backpack-for-pytorch", "curvlinops-for-pytorch")
_VECTOR_FLAGS = re.compile(r"^(avx|amx|fma|f16c|sve|asimd|bf16|i8mm)")


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))  # of several processors the first
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def machine_name() -> str:
    """A folder name for this machine's results."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {torch.get_num_threads()} threads".lower()).strip("-")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    changed = _git("status", "--porcelain")
    return {
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
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changed is None else len(changed.splitlines()),
    }
