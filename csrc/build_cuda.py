"""Builds the kernels of csrc/cuda: with nvcc for GPUs, and with a C++ compiler for the CPU, where tests run them.

python csrc/build_cuda.py                        fastmeta/_C_cuda.so
python csrc/build_cuda.py --resources            the same, and a table of registers, shared memory and spills
python csrc/build_cuda.py --emulated             the library that FASTMETA_CUDA_EMULATION names; prints its path
python csrc/build_cuda.py --headers INCLUDE      compiles every source against another torch's headers, links nothing

FASTMETA_CUDA_ARCHITECTURES=90 builds for one GPU only; MAX_JOBS limits the compilers that run at once.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90", "100")  # the last one's PTX is there for what comes after
# One source for torch 2.11 and later: nothing newer than the 2.11 stable ABI may be used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
Command = list[str]


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture, as ptxas reports it; memory in bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


def find_nvcc() -> Path | None:
    """The CUDA compiler: of CUDA_HOME, on the PATH, or where NVIDIA installs it."""
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = shutil.which("nvcc", path=os.pathsep.join([str(homes[0]), os.environ.get("PATH", ""), str(homes[-1])]))
    return None if found is None else Path(found)


def wanted() -> bool:
    """Whether an installation builds the CUDA kernels: FASTMETA_CUDA=1 or 0 says so, else torch and nvcc do."""
    setting = os.environ.get("FASTMETA_CUDA")
    if setting not in (None, "", "0", "1"):
        raise ValueError(f"FASTMETA_CUDA must be 0 or 1, got {setting!r}")
    if setting:
        return setting == "1"
    import torch

    return torch.version.cuda is not None and find_nvcc() is not None


def _torch_include() -> Path:
    import torch

    return Path(torch.__file__).parent / "include"


def sources() -> list[Path]:
    """The CUDA sources."""
    return sorted(CSRC.glob("cuda/*.cu"))


def _nvcc_command(include: Path, codes: Command) -> Command:
    """Compiles one source, up to the source and the output; ``codes`` say for which architectures."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not found; put it on the PATH or set CUDA_HOME")
    command = [str(nvcc), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return [*command, "-DUSE_CUDA", STABLE_ABI, f"-I{CSRC}", f"-I{include}", *codes, "-Xptxas=-v", "-c"]


def _codes() -> Command:
    chosen = os.environ.get("FASTMETA_CUDA_ARCHITECTURES", "").replace(",", " ").split() or ARCHITECTURES
    last = f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"
    return [*(f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen), last]


def _emulation_command(include: Path) -> Command:
    """Compiles one source for the CPU, up to the source and the output."""
    command = [compiler(), "-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    names = ["-DFASTMETA_EMULATE", "-DFASTMETA_NAMESPACE=fastmeta_emulated", "-DFASTMETA_DEVICE_KEY=CPU"]
    return [*command, STABLE_ABI, *names, f"-I{CSRC}", f"-isystem{include}", "-c", "-xc++"]


def compiler() -> str:
    """The C++ compiler."""
    return os.environ.get("CXX", "c++")


def _run(command: Command) -> str:
    """What a command prints; raises with it if the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _compile_all(command: Command, files: Sequence[Path], include: Path, folder: Path) -> list[Path]:
    """An object for each source, beside it what the compiler said; what is up to date is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    common = hashlib.sha256(shlex.join(command).encode())
    for header in [include / "torch/headeronly/version.h", *sorted(CSRC.rglob("*.h"))]:
        common.update(header.read_bytes())

    def compile_one(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        made = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not made.exists():
            part = made.with_suffix(f".{os.getpid()}.o")
            made.with_suffix(".txt").write_text(_run([*command, str(source), "-o", str(part)]))
            part.replace(made)  # whole or not at all, whoever else builds
        return made

    with ThreadPoolExecutor(_jobs()) as pool:
        return list(pool.map(compile_one, files))


def _link(command: Command, objects: Sequence[Path], library: Path) -> Path:
    """``command`` comes after the objects, as libraries do."""
    part = library.with_suffix(f".{os.getpid()}")
    library.parent.mkdir(parents=True, exist_ok=True)
    _run([*command[:1], "-shared", *map(str, objects), *command[1:], "-o", str(part)])
    part.replace(library)
    return library


def _torch_libraries(folder: Path, names: Sequence[str]) -> Command:
    """Linker options by which the loader finds torch's libraries among those that torch has loaded.

    A torch without CUDA has no libtorch_cuda.so; an empty library of that name stands for it.
    """
    import torch

    paths = [Path(torch.__file__).parent / "lib", folder]
    for name in names:
        if not any((path / f"lib{name}.so").exists() for path in paths):
            folder.mkdir(parents=True, exist_ok=True)
            soname = f"-Wl,-soname,lib{name}.so"
            _run([compiler(), "-shared", soname, "-xc", os.devnull, "-o", str(folder / f"lib{name}.so")])
    return [*(f"-L{path}" for path in paths), *(f"-l{name}" for name in names)]


def build(library: Path) -> list[Path]:
    """Build the CUDA library; returns the objects it is made of."""
    command = _nvcc_command(_torch_include(), _codes())
    objects = _compile_all(command, sources(), _torch_include(), ROOT / "build/cuda")
    # The CUDA runtime linked in must not answer for torch's, nor torch's for it.
    options = ["-Xlinker=--exclude-libs,ALL,--no-as-needed,-s", "-cudart=static"]
    libraries = _torch_libraries(ROOT / "build/cuda/none", ["torch_cpu", "torch_cuda"])
    _link([command[0], *options, *libraries], objects, library)
    return objects


def build_emulated() -> Path:
    """Build the library of the same kernels for the CPU; returns its path, which tells its sources apart."""
    folder, command = ROOT / "build/emulated", _emulation_command(_torch_include())
    files = [CSRC / "operators.cpp", CSRC / "cuda/emulator.cpp", *sources()]
    objects = _compile_all(command, files, _torch_include(), folder)
    name = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    library = folder / f"emulated-{name}.so"
    if not library.exists():
        libraries = _torch_libraries(folder, ["torch_cpu"])
        _link([command[0], "-Wl,--no-as-needed,-s", *libraries], objects, library)
    return library


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(said: str) -> list[Resources]:
    """The reports in the output of ``ptxas -v``."""
    found = []
    for report in re.split(r"(?=ptxas info\s+: Compiling entry)", said):
        entry, stack, used = _ENTRY.search(report), _STACK.search(report), _USED.search(report)
        if entry is None:
            continue
        if stack is None or used is None:
            raise ValueError(f"a report of ptxas has another form:\n{report}")
        shared = _SHARED.search(report)
        found.append(
            Resources(
                kernel=entry[1],
                architecture=f"sm_{entry[2]}",
                registers=int(used[1]),
                shared=int(shared[1]) if shared else 0,
                stack=int(stack[1]),
                spills=int(stack[2]) + int(stack[3]),
            )
        )
    return found


def resources(objects: Sequence[Path]) -> list[Resources]:
    """What the kernels in these objects take."""
    return [entry for made in objects for entry in parse_resources(made.with_suffix(".txt").read_text())]


def table(entries: Sequence[Resources]) -> str:
    """The resources as text, with readable names."""
    names = [entry.kernel for entry in entries]
    if shutil.which("c++filt"):
        names = _run(["c++filt", "-p", *names]).splitlines()
    rows = [("kernel", "architecture", "registers", "shared", "stack", "spills")]
    for name, entry in zip(names, entries, strict=True):
        short = name.replace("fastmeta::", "").replace("(anonymous namespace)::", "")
        numbers = map(str, (entry.registers, entry.shared, entry.stack, entry.spills))
        rows.append((short, entry.architecture, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def check_headers(include: Path) -> int:
    """Compile every source, of the CPU too, against the torch headers in ``include``; returns how many."""
    folder = ROOT / "build/headers"
    cpp = [compiler(), "-std=c++20", "-O0", "-fPIC", "-ffp-contract=fast", STABLE_ABI, f"-I{CSRC}", f"-I{include}"]
    cpp += [f"-I{sysconfig.get_path('include')}", '-DFASTMETA_BUILT_FOR_TORCH="headers only"', "-c"]
    for_cpu = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
    _compile_all(cpp, for_cpu, include, folder)
    # To PTX and no further: what comes then does not see the headers.
    _compile_all(_nvcc_command(include, ["-gencode=arch=compute_90,code=compute_90"]), sources(), include, folder)
    return len(for_cpu) + len(sources())


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "fastmeta/_C_cuda.so", help="the library to build")
    parser.add_argument("--resources", action="store_true", help="print what each kernel takes; 1 if one spills")
    parser.add_argument("--emulated", action="store_true", help="build the emulation for the CPU, print its path")
    parser.add_argument("--headers", type=Path, metavar="INCLUDE", help="compile only, against these torch headers")
    arguments = parser.parse_args()
    if arguments.headers:
        print(f"{check_headers(arguments.headers)} sources compile against {arguments.headers}")
    elif arguments.emulated:
        print(build_emulated())
    else:
        entries = resources(build(arguments.output))
        if arguments.resources:
            print(table(entries))
            sys.exit(any(entry.spills for entry in entries))


if __name__ == "__main__":
    _main()
