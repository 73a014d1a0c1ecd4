"""Compiles what a GPU will run on a machine that has none, into an archive for ``python -m bench gpu --cache FILE``.

Every launch of the Triton kernels that a call can make on the architecture, and the libraries (the CUDA kernels where
nvcc is found). Triton's keys name its own build: for a machine with another Python, give that Python's wheel of Triton
(``pip download --only-binary :all: --python-version 3.12 --no-deps triton==...``) as --triton-wheel.
"""

import argparse
import hashlib
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from bench import resources
from bench.gpu import cache

ROOT = Path(__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--archive", type=Path, default=Path("fastmeta-cache.tar.gz"), help="(%(default)s)")
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90, 100), help="compute capability (%(default)s)")
    parser.add_argument("--triton-wheel", type=Path, metavar="FILE", help="Triton as the GPU's machine has it")
    parser.add_argument("--python", default=sys.executable, help="builds the libraries (this Python)")
    parser.add_argument("--quick", action="store_true", help="no libraries, and the heaviest loss in two dtypes alone")
    parser.add_argument("--processes", type=int, help="compilers that run at once (default: one for each processor)")


def run(options: argparse.Namespace) -> int:
    from bench import compiled, specimens

    begin = time.monotonic()
    if not options.quick:
        _build(options)
    key = triton_key(options.triton_wheel) if options.triton_wheel else None
    jobs = list(dict.fromkeys(compiled.work(one.launch, options.arch) for one in specimens.launches(options.quick)))
    print(f"{len(jobs)} kernels for sm_{options.arch} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= cache.environment(Path(folder))
        use_key = {"initializer": _use_key, "initargs": (key,)}
        reasons = list(compiled.in_processes(compiled.compile_only, jobs, options.processes, **use_key))
        size = cache.pack(options.archive, Path(folder), built=not options.quick)
    failed = [(job, reason) for job, reason in reasons if reason]
    for job, reason in failed:
        print(f"{job.module}.{job.kernel} {dict(job.options)}: {reason}", file=sys.stderr)
    seconds = time.monotonic() - begin
    print(f"{options.archive}: {len(jobs) - len(failed)} kernels, {size / 1e6:.1f} MB, {seconds:.0f} s")
    return 1 if failed else 0


def _build(options: argparse.Namespace) -> None:
    path = os.pathsep.join([str(Path(options.python).parent), os.environ.get("PATH", os.defpath)])
    environment = {"PATH": path, "FASTMETA_CUDA_ARCHITECTURES": str(options.arch)}
    if resources.build_cuda().find_nvcc() is not None:
        environment["FASTMETA_CUDA"] = "1"  # also for a torch without CUDA
    subprocess.run(
        [options.python, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=os.environ | environment, check=True
    )


def _use_key(key: str | None) -> None:
    """In a process that compiles: file kernels under the key of another build of Triton."""
    if key is not None:
        from triton.runtime import cache as triton_cache

        triton_cache.triton_key = lambda: key


def triton_key(wheel: Path) -> str:
    """What ``triton.runtime.cache.triton_key`` says where this wheel is installed.

    The wheel has to be of the version that is installed here: which files go into the key is read off that one.
    """
    import triton

    folder = Path(triton.__file__).parent
    if f"triton-{triton.__version__}-" not in wheel.name:
        raise ValueError(f"--triton-wheel: expected triton {triton.__version__} as installed here, got {wheel.name}")
    with zipfile.ZipFile(wheel) as files:

        def digest(path: Path) -> str:
            found = hashlib.sha256()
            with files.open(f"triton/{path.as_posix()}") as file:
                while chunk := file.read(1 << 20):
                    found.update(chunk)
            return found.hexdigest()

        def package(name: str) -> list[str]:
            modules = pkgutil.walk_packages([str(folder / name)], prefix=f"triton.{name}.")
            origins = [m.module_finder.find_spec(m.name).origin for m in modules]  # type: ignore[call-arg, union-attr]
            return [digest(Path(str(origin)).relative_to(folder)) for origin in origins]

        contents = [digest(Path("runtime/cache.py")), *package("compiler"), *package("backends")]
        contents += [digest(Path("_C/libtriton.so")), *package("language")]
    return f"{triton.__version__}" + "-".join(contents)
