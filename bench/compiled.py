"""Compiles Triton launches for GPUs that are not there, and reads what the machine code takes."""

import os
import re
import subprocess
import tempfile
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastmeta.triton_kernels._program import Recorded

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may take: CUDA's programming guide
TENSOR_MEMORY = 512  # columns, sm_100
_Found = TypeVar("_Found")


class Work(NamedTuple):
    """A kernel as Triton's JIT specializes it for a launch, for one architecture."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]  # as JSON-like text: lists do not hash
    options: tuple[tuple[str, int], ...]
    architecture: int


class Resources(NamedTuple):
    """What a compiled kernel takes; memory in bytes."""

    registers: int
    shared: int
    spills: int
    problem: str  # empty if it can run


_binders: dict[tuple[Any, int], Any] = {}


def work(launch: Recorded, architecture: int) -> Work:
    """What the JIT would compile for a launch on this architecture: types, alignment and integers that equal 1."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    key = kernel, architecture
    if key not in _binders:
        _binders[key] = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = _binders[key](*launch.arguments, **launch.constants, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    as_text = tuple((path, repr(value)) for path, value in attributes.items())
    parts = tuple(signature.items()), tuple(constants.items()), as_text, tuple(launch.options.items())
    return Work(kernel.__module__, kernel.fn.__name__, *parts, architecture)


def compiled(job: Work) -> Any:
    """As the JIT does, into Triton's cache."""
    kernel = getattr(import_module(job.module), job.kernel)
    attributes = {path: literal_eval(text) for path, text in job.attributes}
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), attributes)
    return triton.compile(source, GPUTarget("cuda", job.architecture, 32), dict(job.options))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def compile_only(job: Work) -> str:
    """Why it does not compile; empty if it does."""
    try:
        compiled(job)
    except Exception as error:
        return _reason(error)
    return ""


def compile_one(job: Work) -> Resources:
    """Compile and read the machine code; a failure is told, not raised."""
    try:
        made = compiled(job)
    except Exception as error:
        return Resources(0, 0, 0, _reason(error))
    registers, stack = usage(made.asm["cubin"])
    spills = _spills(made.asm["ptx"], job.architecture) if stack else 0
    problem = f"{spills} bytes of spills" if spills else ""
    if made.metadata.shared > SHARED_MEMORY[job.architecture]:
        problem = f"{made.metadata.shared} bytes of shared memory"
    if (getattr(made.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY:
        problem = f"{made.metadata.tmem_size} columns of tensor memory"
    return Resources(registers, made.metadata.shared, spills, problem)


_REGISTERS = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _REGISTERS.search(said)
    if found is None:
        raise ValueError(f"cuobjdump says something else:\n{said}")
    return int(found[1]), int(found[2]) + int(found[3])


def _spills(ptx: str, architecture: int) -> int:
    """Bytes that the assembler spills, as it reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={sm_arch_from_capability(architecture)}"]
        command += [str(source), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(stores) + int(loads) for stores, loads in _SPILLS.findall(said))


def in_processes(
    function: Callable[[Work], _Found], jobs: Iterable[Work], processes: int | None, **pool_options: Any
) -> Iterator[tuple[Work, _Found]]:
    """Every job, in several processes, in the order given."""
    jobs = list(jobs)
    processes = processes or min(os.cpu_count() or 1, 16)
    # Spawned, so that Triton reads the environment anew.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), **pool_options) as pool:
        yield from zip(jobs, pool.map(function, jobs, chunksize=4), strict=True)
