"""The example programs: short, and they run."""

import importlib
import math
import pkgutil
from pathlib import Path

import pytest

from fastmeta import examples

NAMES = [module.name for module in pkgutil.iter_modules(examples.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"fastmeta.examples.{name}")
    assert len(Path(module.__file__).read_text().splitlines()) < 80
    assert module.__doc__
    result = module.main(steps=2)
    assert isinstance(result, float)
    assert math.isfinite(result)
    assert "after 2 steps" in capsys.readouterr().out


def test_there_is_one_for_every_published_method() -> None:
    assert {"l2i", "meta_gradient", "example_weights", "label_gradient_alignment"} <= set(NAMES)
