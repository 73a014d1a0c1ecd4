"""What torch.compile sees of an operator on CUDA tensors: one opaque node. Fake tensors need no GPU."""

import pytest
import torch
from cases import CASES, Draw, map_tensors, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmeta import Head, _extension

pytestmark = pytest.mark.skipif(_extension._C is None, reason="the C++ extension is not built")


class Call(torch.nn.Module):
    """The public function of a case, its tensors given in order."""

    def __init__(self, case, arguments):
        super().__init__()
        self.case = case
        self.arguments = arguments

    def forward(self, *given):
        remaining = iter(given)

        def place(value):
            if isinstance(value, Head):
                return Head(*(None if part is None else next(remaining) for part in value))
            return next(remaining) if isinstance(value, torch.Tensor) else value

        return tuple(self.case.call({name: place(value) for name, value in self.arguments.items()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_opaque_node(case, dtype, generator, monkeypatch):
    # As on a machine with a GPU; tracing must not run it.
    kernels = {("cuda", None): lambda *arguments: pytest.fail("a kernel ran")}
    monkeypatch.setattr(case.operator, "_kernels", case.operator._kernels | kernels)
    for variant in case.variants:
        plain = case.arguments(Draw(generator, dtype), (6, 5, 4), case.losses[0], variant)
        plain = map_tensors(lambda t: t.cpu(), plain)
        with FakeTensorMode():
            fake = map_tensors(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"), plain)
            program = torch.export.export(Call(case, fake), tuple(tensors(fake)), strict=True)
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        called = [node.target for node in nodes if str(node.target) != "<built-in function getitem>"]
        assert called == [getattr(torch.ops.fastmeta, case.name).default], (variant, called)
        results = [node.meta["val"] for node in nodes if isinstance(node.meta["val"], torch.Tensor)]
        expected = case.call(plain, "reference")
        assert [r.shape for r in results if r.numel()] == [e.shape for e in expected]
        assert all(r.device.type == "cuda" and r.dtype == dtype for r in results)
