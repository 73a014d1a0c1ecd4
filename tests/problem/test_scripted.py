"""TorchScript inside the model: right however often, and on whatever graph, its executor has run before."""

import pytest
import torch
from model_checks import WAYS, assert_same_state, check_ways, direction_of, everything_about
from torch import nn
from whole_model_nets import normal

import fastmeta

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


def swish(x: torch.Tensor, slope: float = 1.0) -> torch.Tensor:
    return x * torch.sigmoid(slope * x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor, scale: float = 1.5) -> torch.Tensor:
        return torch.tanh(self.norm(self.linear(x))) * scale


class Net(nn.Module):
    def __init__(self, act, block):
        super().__init__()
        self.first, self.act, self.block, self.fc = nn.Linear(4, 5), act, block, nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.block(self.act(self.first(x), slope=0.7), scale=2.0) + self.block(self.act(self.first(x))))


def scripted():
    return torch.jit.script(swish), torch.jit.script(Block().double())


def traced():
    """Their later arguments are constants."""
    example = torch.zeros(4, 5, dtype=torch.float64)
    act = torch.jit.trace(swish, example)
    block = torch.jit.trace(Block().double().train(), example, check_trace=False)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x, scale=1.5):
            return self.block(x) * (scale / 1.5)

    return (lambda x, slope=1.0: act(slope * x) / slope), Wrapped()


@pytest.mark.parametrize("make", [scripted, traced])
def test_every_way_between_training_passes(make, generator):
    act, block = make()
    model, plain = Net(act, block).double(), Net(swish, Block()).double()
    plain.load_state_dict({name.replace("block.block", "block"): value for name, value in model.state_dict().items()})
    x, y, v = normal(generator, 6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), direction_of(model, generator)
    of_plain = {name.replace("block.block", "block"): value for name, value in v.items()}
    for _ in range(4):
        for net in (model, plain):
            net(x).square().sum().backward()
        before = everything_about(model)
        for how in WAYS:
            got = fastmeta.label_gradient(model, x, v, how=how, radius=1e-5)
            torch.testing.assert_close(got, fastmeta.label_gradient(plain, x, of_plain, how=how, radius=1e-5))
        assert_same_state(before, everything_about(model))
        got, expected = (
            torch.autograd.grad(
                fastmeta.L2I(how="jvp").refine(model=net, unlabeled=x, holdout=x, targets=y).loss,
                list(net.parameters()),
            )
            for net in (model, plain)
        )
        torch.testing.assert_close(got, expected)


def test_it_is_the_definition(generator):
    act, block = scripted()
    model = Net(act, block).double()
    x = normal(generator, 6, 4)
    for _ in range(3):
        model(x).square().sum().backward()
    check_ways(Net(swish, Block()).double(), x, direction_of(model, generator))


def test_wrong_arguments_are_torchscript_s_to_refuse(generator):
    act, block = scripted()
    model = Net(lambda x, slope=1.0: act(x, gradient=slope), block).double()
    with pytest.raises(RuntimeError, match="gradient"):
        fastmeta.label_gradient(model, normal(generator, 6, 4), direction_of(model, generator))
    torch.testing.assert_close(act(torch.ones(2)), swish(torch.ones(2)))
