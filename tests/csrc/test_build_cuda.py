"""The CUDA library: compiled without spills, linked, and loaded only where it belongs.

For sm_90, or for what FASTMETA_CUDA_ARCHITECTURES names: CI compiles for all, as ``python -m bench resources`` does.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_cuda
import cuda_emulation
import pytest
import torch

from fastmeta import _extension

ROOT = Path(__file__).parents[2]
REQUIRED = os.environ.get("FASTMETA_REQUIRE_NVCC") == "1"
LIST_OPERATORS = [
    "perturb_epsilon",
    "perturb_",
    "perturb_restore_",
    "alignment_direction_",
    "masked_adam_",
    "augment",
    "crop",
    "conjugate_gradient",
]
CHOSEN = os.environ.get("FASTMETA_CUDA_ARCHITECTURES", "90")  # one: they take a minute and a half each
needs_nvcc = pytest.mark.skipif(build_cuda.find_nvcc() is None and not REQUIRED, reason="no nvcc")
# The widest shared memory of a block that a kernel may ask for without opting in.
STATIC_SHARED = 48 * 1024


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """fastmeta as it is installed, with the library, in a folder of its own."""
    package = tmp_path_factory.mktemp("installed") / "fastmeta"
    unwanted = shutil.ignore_patterns("__pycache__", "_C_cuda.so")
    shutil.copytree(ROOT / "fastmeta", package, ignore=unwanted)
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels", ignore=unwanted)
    return package


@pytest.fixture(scope="module")
def objects(package):
    """What the library is made of, once it is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMETA_CUDA_ARCHITECTURES", CHOSEN)
        return build_cuda.build(package / "_C_cuda.so")


def test_the_emulation_builds():
    if shutil.which(build_cuda.compiler()) is None:
        pytest.skip("no C++ compiler")
    library = build_cuda.build_emulated()
    assert library.exists()
    assert build_cuda.build_emulated() == library
    if cuda_emulation.VARIABLE in os.environ:
        assert _extension.EMULATED


@needs_nvcc
def test_every_kernel_without_spills(objects):
    assert {path.name.rsplit("-", 1)[0] for path in objects} == {path.stem for path in build_cuda.sources()}
    entries = build_cuda.resources(objects)
    table = build_cuda.table(entries)
    print(table)
    for made in objects:
        found = [(e.kernel, e.architecture) for e in build_cuda.resources([made])]
        kernels = {kernel for kernel, _ in found}
        expected = [(kernel, f"sm_{number}") for kernel in kernels for number in CHOSEN.split()]
        assert sorted(found) == sorted(expected), made
    without = [path for path in objects if not build_cuda.resources([path])]
    assert [path.name.rsplit("-", 1)[0] for path in without] == ["architectures", "operators"]
    assert [e for e in entries if e.spills] == [], table
    assert all(e.shared <= STATIC_SHARED for e in entries), table


def run_child(code: str, folder: Path) -> str:
    plain = {k: v for k, v in os.environ.items() if k not in (cuda_emulation.VARIABLE, "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nvcc
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has CUDA")
def test_a_torch_without_cuda_leaves_it_alone(package, objects):
    said = run_child(
        "import fastmeta\n"
        "from fastmeta import _extension as extension\n"
        "print(extension._CUDA_LIBRARY.exists(), extension.CUDA_REASON, extension.build_info()['cuda_architectures'])\n"
        "assert '_C_cuda' not in open('/proc/self/maps').read()\n",
        package.parent,
    )
    assert said == "True this torch is built without CUDA []\n"


@needs_nvcc
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has CUDA: the real thing is loaded")
def test_it_loads_and_registers_every_operator(package, objects, tmp_path):
    """With the one function of libtorch_cuda.so that it needs, it loads into a torch without CUDA too."""
    source, stub = tmp_path / "stub.c", tmp_path / "libtorch_cuda.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    command = [build_cuda.compiler(), "-shared", "-fPIC", "-xc", str(source), "-o", str(stub)]
    subprocess.run([*command, "-Wl,-soname,libtorch_cuda.so"], check=True)
    said = run_child(
        f"import ctypes, torch\n"
        f"ctypes.CDLL({str(stub)!r})\n"
        f"torch.backends.cuda.is_built = lambda: True\n"
        f"import fastmeta\n"
        f"from fastmeta import _extension\n"
        f"assert _extension.CUDA_REASON is None, _extension.CUDA_REASON\n"
        f"print(*_extension.build_info()['cuda_architectures'])\n"
        f"print(all(_extension.has_kernel(name, 'CUDA') for name in {LIST_OPERATORS}))\n"
        f"from fastmeta.ops.perturbed import MOVE\n"
        f"print(MOVE.implementations('cuda'), MOVE.implementations('cpu'))\n",
        package.parent,
    )
    architectures = " ".join(f"sm_{number}" for number in CHOSEN.split())
    assert said.splitlines() == [architectures, "True", "('reference', 'cuda') ('reference', 'cpp')"]


REPORT = """
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN8fastmeta1kEPfl' for 'sm_80'
ptxas info    : Function properties for _ZN8fastmeta1kEPfl
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 256 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 17.303 ms
ptxas info    : Compiling entry function 'other' for 'sm_100'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_the_compilers_report_is_read():
    first, second = build_cuda.parse_resources(REPORT)
    assert first == build_cuda.Resources("_ZN8fastmeta1kEPfl", "sm_80", registers=48, shared=256, stack=8, spills=28)
    assert second == build_cuda.Resources("other", "sm_100", registers=12, shared=0, stack=0, spills=0)
    rows = [line.split() for line in build_cuda.table([first, second]).splitlines()]
    assert rows[1][-5:] == ["sm_80", "48", "256", "8", "28"]
    assert rows[2] == ["other", "sm_100", "12", "0", "0", "0"]
    with pytest.raises(ValueError, match="another form"):
        build_cuda.parse_resources(REPORT.replace("Used 12 registers", "Needs 12 registers"))


@pytest.mark.parametrize(
    ("setting", "cuda", "expected"),
    [("", "13.0", True), ("", None, False), ("1", None, True), ("0", "13.0", False)],
)
def test_who_builds_it(monkeypatch, setting, cuda, expected):
    monkeypatch.setenv("FASTMETA_CUDA", setting)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: Path("nvcc"))
    assert build_cuda.wanted() == expected
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    assert build_cuda.wanted() == (expected and setting == "1")


def test_settings_that_mean_nothing_are_refused(monkeypatch):
    monkeypatch.setenv("FASTMETA_CUDA", "yes")
    with pytest.raises(ValueError, match="FASTMETA_CUDA must be 0 or 1, got 'yes'"):
        build_cuda.wanted()
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    with pytest.raises(FileNotFoundError, match="nvcc is not found"):
        build_cuda.build(Path("unused.so"))


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("this is no C++\n")
    monkeypatch.setattr(build_cuda, "sources", lambda: [source])
    if shutil.which(build_cuda.compiler()) is None:
        pytest.skip("no C++ compiler")
    with pytest.raises(RuntimeError, match=r"(?s)wrong\.cu.*ended with 1:.*error"):
        build_cuda.build_emulated()
