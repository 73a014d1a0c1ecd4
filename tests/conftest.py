"""Seeds: fresh in every run, printed with a failure, fixed by FASTMETA_SEED. And what runs the GPU's kernels here."""

import contextlib
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path

import cuda_emulation

# Before torch is imported. Tests of threads set their own number; pytest-xdist runs a test on every core as it is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In the process itself: Inductor's pool of compilers would import torch once more for each of them.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Before anything imports fastmeta or Triton. FASTMETA_TEST_DEVICE=cuda runs the operators' tests on a GPU instead.
if os.environ.get("FASTMETA_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    cuda_emulation.enable()

import pytest
import torch
from cases import DEVICE, Draw

SEED = int(os.environ.get("FASTMETA_SEED") or secrets.randbelow(2**31))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pictures that tests decode stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FASTMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of this test's own: its numbers depend on the seed and the test's name, not on the order of tests."""
    return torch.Generator("cpu").manual_seed(SEED ^ zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="module")
def module_draw(request: pytest.FixtureRequest) -> Draw:
    """Like ``draw``, for what the tests of a module share."""
    return Draw(torch.Generator("cpu").manual_seed(SEED ^ zlib.crc32(request.node.name.encode())))


@pytest.fixture(scope="module")
def on_device() -> Iterator[None]:
    """Tensors that name no device are on the one under test. For ``pytest.mark.usefixtures``."""
    with torch.device(DEVICE) if DEVICE != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture
def draw(generator: torch.Generator) -> Draw:
    return Draw(generator)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, which outlives what the test makes of it.

    DistributedDataParallel's reducer must not be the last that holds a group: it would wait, with the GIL, for the
    group's threads, which may need it.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        report.sections.append(("seed", f"run again with FASTMETA_SEED={SEED}"))
    return report
