"""Within an autocast region the Triton operators, the library's products among them, keep their arguments' dtype."""

import pytest
import torch
from cases import CASES, DEVICE, Draw

pytest.importorskip("triton")
from fastmeta.triton_kernels import _rule


@pytest.mark.parametrize("form", _rule.FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_autocast_changes_nothing(case, form, generator):
    if "triton" not in case.operator.implementations(DEVICE):
        pytest.skip("no Triton kernel here")
    if (case.name, form) == ("feature_similarity", "fused"):
        pytest.skip("16-bit tensors alone")
    draw = Draw(generator, torch.float32)
    for variant in case.variants:
        arguments = case.arguments(draw, (20, 8, 5), case.losses[0], variant)
        with _rule.force(form):
            expected = case.call(arguments, "triton")
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                got = case.call(arguments, "triton")
                assert (
                    torch.mm(torch.ones(2, 2, device=DEVICE), torch.ones(2, 2, device=DEVICE)).dtype == torch.bfloat16
                )
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other), variant
