"""torch.library.opcheck of the last-layer operators: schema, fake kernel, autograd registration, AOT dispatch."""

import importlib

import pytest
import torch
from cases import CASES, DTYPES, Draw
from torch.testing._internal.optests import OpCheckError

from fastmeta import _extension, dispatch

CASES_WITH_KERNEL = [case for case in CASES if "cpp" in case.operator.implementations()]
pytestmark = pytest.mark.skipif(_extension._C is None, reason="the C++ extension is not built")
cases = pytest.mark.parametrize("case", CASES_WITH_KERNEL, ids=lambda case: case.name)


@cases
@pytest.mark.parametrize("shape", [(6, 5, 4), (0, 5, 4), (1, 1, 1)], ids=str)
def test_opcheck(case, shape, draw):
    operator = getattr(torch.ops.fastmeta, case.name).default
    for variant in case.variants:
        torch.library.opcheck(operator, case.raw(case.arguments(draw, shape, case.losses[0], variant)))


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_kernels_predict_results(case, dtype, generator):
    """Shape, dtype, strides and device, for every variant and loss."""
    operator = getattr(torch.ops.fastmeta, case.name).default
    for loss in case.losses:
        for variant in case.variants:
            arguments = case.raw(case.arguments(Draw(generator, dtype), (6, 5, 4), loss, variant))
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_has_a_fake_kernel_and_the_guard():
    importlib.import_module("fastmeta.data")  # has an operator of its own
    names = [str(schema) for schema in torch._C._jit_get_all_schemas() if str(schema).startswith("fastmeta::")]
    defined = {name.split("(")[0].removeprefix("fastmeta::") for name in names}
    assert defined == set(dispatch.OPERATORS)
    for name in defined:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmeta::{name}", "Meta") or (
            torch._library.simple_registry.singleton.find(f"fastmeta::{name}").fake_impl.kernel is not None
        )
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmeta::{name}", "Autograd")


def test_opcheck_notices():
    """It fails for a fake kernel with the wrong shape: the checks above are not idle."""
    with torch.library._scoped_library("fastmeta_opcheck", "FRAGMENT") as library:
        library.define("wrong(Tensor x) -> Tensor")
        library.impl("wrong", lambda x: x + 1, "CPU")
        torch.library.register_fake("fastmeta_opcheck::wrong", lambda x: x.new_empty(x.shape[0] + 1), lib=library)
        with pytest.raises(OpCheckError):
            torch.library.opcheck(torch.ops.fastmeta_opcheck.wrong.default, (torch.ones(3),))
