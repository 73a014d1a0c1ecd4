"""The example of each method runs, is short, and needs nothing beside this package."""

import importlib
import math
import pkgutil
import re
from pathlib import Path

import pytest

from fastmeta import examples

NAMES = [module.name for module in pkgutil.iter_modules(examples.__path__)]
ALLOWED = {"fastmeta", "torch", "copy", "math", "collections", "dataclasses", "typing"}


@pytest.mark.parametrize("name", NAMES)
def test_example(name, capsys):
    module = importlib.import_module(f"fastmeta.examples.{name}")
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert len(source.splitlines()) < 80
    imported = re.findall(r"^(?:from|import) (\w+)", source, flags=re.MULTILINE)
    assert set(imported) <= ALLOWED
    result = module.main(steps=2)
    assert isinstance(result, float)
    assert math.isfinite(result)
    assert len(capsys.readouterr().out.splitlines()) >= 1


def test_there_are_examples():
    assert {"l2i", "l2i_text", "l2i_landmarks", "meta_gradient"} <= set(NAMES)
