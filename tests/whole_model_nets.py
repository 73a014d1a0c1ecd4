"""Small float64 networks for the tests of the whole model: a few hundred parameters each, and a last layer ``fc``.

    model, make_inputs = conv_net(generator)       # NETS["conv"](generator) is the same
    f = forward(model, make_inputs(6))             # [6, model.fc.out_features], see whole_model_brute_force

=============  ================================================================  ===================================
net            what it stands for                                                ``make_inputs(count)``
=============  ================================================================  ===================================
conv_net       BatchNorm (running statistics far from 0 and 1), dropout          images ``[N, channels, size, size]``
text_net       attention with dropout, LayerNorm, padding                        ``{"input_ids", "attention_mask"}``
tied_net       one weight under two names, a frozen layer, several arguments     ``(x, context)``
mlp            a smooth function with no randomness and no buffers               ``x [N, width]``
=============  ================================================================  ===================================

Parameters, running statistics and inputs come from the generator; torch's global random state is left alone. A model is
returned in train mode: call ``.eval()`` for the other one. Every activation is smooth, so that finite differences
converge. In train mode with N = 1 all of them still work (BatchNorm sees the pixels).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


class Net(NamedTuple):
    model: nn.Module
    make_inputs: Callable[[int], Inputs]


class Conv(nn.Module):
    def __init__(self, channels: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, width + 1, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width + 1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.fc = nn.Linear(width + 1, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images))


class Text(nn.Module):
    def __init__(self, tokens: int, heads: int, classes: int, dropout: float) -> None:
        super().__init__()
        width = 3 * heads
        self.embedding = nn.Embedding(tokens, width)
        self.block = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=7, dropout=dropout, activation="gelu", layer_norm_eps=0.1, batch_first=True
        )
        self.norm = nn.LayerNorm(width, eps=0.1)  # few features: a small variance would make training stiff
        self.fc = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.block(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1)
        return self.fc(self.norm((mask * h).sum(1) / mask.sum(1)))


class Decoder(nn.Module):
    """The transpose of another layer's weight, which is registered here under a second name."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # [out, in] of the encoder
        self.bias = nn.Parameter(torch.zeros(weight.shape[1]))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight + self.bias


class Tied(nn.Module):
    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, hidden)
        self.decoder = Decoder(self.encoder.weight)
        self.frozen = nn.Linear(width, hidden).requires_grad_(False)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        decoded = self.decoder(self.encoder(x).tanh())
        return self.fc(self.frozen((decoded + context).tanh()).tanh())


class Mlp(nn.Sequential):
    """``fc`` is the name of the last layer; the others are numbered."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.add_module("fc", nn.Linear(hidden, classes))


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_state(model: nn.Module, generator: Generator) -> nn.Module:
    """The model in float64: weights of order 1 / sqrt(fan in), scales around 1, running statistics of some training."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 9
            parameter.copy_(normal(generator, *parameter.shape) / fan_in**0.5)
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                module.weight.add_(1)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.5 * normal(generator, module.num_features))
                module.running_var.copy_(normal(generator, module.num_features).abs() + 0.5)
                module.num_batches_tracked.fill_(7)
    return model


def conv_net(
    generator: Generator, *, channels: int = 2, size: int = 5, width: int = 3, classes: int = 3, dropout: float = 0.3
) -> Net:
    """Two convolutions with BatchNorm and dropout, global pooling, ``fc``. ``size >= 3``."""
    with torch.random.fork_rng(devices=[]):
        model = Conv(channels, width, classes, dropout)
    return Net(draw_state(model, generator), lambda count: normal(generator, count, channels, size, size))


def text_net(
    generator: Generator, *, tokens: int = 7, length: int = 5, heads: int = 2, classes: int = 3, dropout: float = 0.2
) -> Net:
    """Embedding, one transformer block, mean over the tokens that are not padding, LayerNorm, ``fc``."""
    with torch.random.fork_rng(devices=[]):
        model = Text(tokens, heads, classes, dropout)

    def make_inputs(count: int) -> dict[str, Tensor]:
        words = torch.randint(1, length + 1, (count, 1), generator=generator)
        return {
            "input_ids": torch.randint(tokens, (count, length), generator=generator),
            "attention_mask": (torch.arange(length) < words).long(),
        }

    return Net(draw_state(model, generator), make_inputs)


def tied_net(generator: Generator, *, width: int = 4, hidden: int = 5, classes: int = 3) -> Net:
    """An encoder whose transposed weight decodes (``encoder.weight is decoder.weight``); ``frozen`` does not train."""
    with torch.random.fork_rng(devices=[]):
        model = Tied(width, hidden, classes)
    return Net(draw_state(model, generator), lambda n: (normal(generator, n, width), normal(generator, n, width)))


def mlp(generator: Generator, *, width: int = 4, hidden: int = 6, classes: int = 3) -> Net:
    """Two tanh layers and ``fc``."""
    with torch.random.fork_rng(devices=[]):
        model = Mlp(width, hidden, classes)
    return Net(draw_state(model, generator), lambda count: normal(generator, count, width))


NETS: dict[str, Callable[..., Net]] = {"conv": conv_net, "text": text_net, "tied": tied_net, "mlp": mlp}

_SHAPES: dict[str, dict[str, st.SearchStrategy[int]]] = {
    "conv": {"channels": st.integers(1, 3), "size": st.integers(3, 6), "width": st.integers(1, 4)},
    "text": {"tokens": st.integers(1, 9), "length": st.integers(1, 6), "heads": st.integers(1, 3)},
    "tied": {"width": st.integers(1, 5), "hidden": st.integers(1, 5)},
    "mlp": {"width": st.integers(1, 5), "hidden": st.integers(1, 7)},
}


class NetCase(NamedTuple):
    model: nn.Module  # in train or eval mode
    inputs: Inputs
    holdout: Inputs
    generator: Generator  # for whatever else the test draws

    @property
    def classes(self) -> int:
        return self.model.fc.out_features


@st.composite
def net_cases(draw: st.DrawFn, names: tuple[str, ...] = tuple(NETS), classes: int = 2) -> NetCase:
    """Any net of any shape and mode, with N = 1, 2, ... unlabeled and hold-out examples.

    ``@given(case=net_cases())``; ``classes`` is the least number of outputs.
    """
    name = draw(st.sampled_from(names))
    shape = {argument: draw(values) for argument, values in _SHAPES[name].items()}
    generator = Generator().manual_seed(draw(st.integers(0, 2**31)))
    model, make_inputs = NETS[name](generator, classes=draw(st.integers(classes, 5)), **shape)
    model.train(draw(st.booleans()))
    return NetCase(model, make_inputs(draw(st.integers(1, 5))), make_inputs(draw(st.integers(1, 4))), generator)


def batch_size(inputs):
    """N of inputs whose first tensor is ``[N, ...]``, as those of all nets here are."""
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    return len(next(iter(values)))
