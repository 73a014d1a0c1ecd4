"""Small models that a derivative of the whole model can get wrong, each for another reason."""

import random
import time

import numpy
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

GENERATOR = torch.Generator().manual_seed(3)
WEIGHTS = [torch.eye(8).requires_grad_()]


class Plain(nn.Module):
    """Two layers; the others are variations of it."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def features(self, x):
        return torch.tanh(self.hidden(x))

    def forward(self, x):
        return self.head(self.features(x))


class ChangesInput(Plain):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


class LazyBuffer(Plain):
    """Its mean is there after the first forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        logits = super().forward(x)
        mean = logits.softmax(1).mean(0).detach()
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return logits - self.mean.log()


class ReentrantCheckpoint(Plain):
    def features(self, x):
        return checkpoint(torch.tanh, self.hidden(x), use_reentrant=True)


class ReentrantCheckpointOfInput(Plain):
    """The first layer's parameters get no gradient at all, in anybody's backward pass."""

    def features(self, x):
        return checkpoint(super().features, x, use_reentrant=True)


class ReentrantCheckpointOfLayer(Plain):
    def forward(self, x):
        return checkpoint(self.head, self.features(x), use_reentrant=True)


class Checkpoint(Plain):
    def features(self, x):
        return checkpoint(super().features, x, use_reentrant=False)


@torch.jit.script
def scripted(x):
    return x * torch.sigmoid(x)


class Scripted(Plain):
    def features(self, x):
        return scripted(self.hidden(x))


class OwnGenerator(Plain):
    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)

    def features(self, x):
        return super().features(x) + 0.3 * torch.randn(len(x), 8, generator=self.noise)


class GlobalGenerator(Plain):
    def features(self, x):
        return super().features(x) + 0.3 * torch.randn(len(x), 8, generator=GENERATOR)


class PythonNoise(Plain):
    def features(self, x):
        return super().features(x) * (1 + random.random())


class NumpyNoise(Plain):
    def features(self, x):
        return super().features(x) * (1 + numpy.random.rand())


class Clock(Plain):
    """No state that anybody could put back."""

    def features(self, x):
        return super().features(x) * (1 + time.perf_counter_ns() % 1000 / 1000)


class ByCalls(Plain):
    """The logits depend on how often it has run."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class CountsCalls(Plain):
    """The logits do not depend on it."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def by_calls_in_a_closure():
    calls = 0

    class ByCallsInAClosure(Plain):
        def forward(self, x):
            nonlocal calls
            calls += 1
            return super().forward(x) * (1 + 0.1 * calls)

    return ByCallsInAClosure()


class GlobalWeights(Plain):
    def features(self, x):
        return super().features(x) @ WEIGHTS[0]


class WeightsInAList(Plain):
    def __init__(self):
        super().__init__()
        self.weights = [torch.eye(8).requires_grad_()]

    def features(self, x):
        return super().features(x) @ self.weights[0]


class CheckpointedWeightsInAList(WeightsInAList):
    """No graph of the forward shows them."""

    def forward(self, x):
        return self.head(checkpoint(torch.matmul, Plain.features(self, x), self.weights[0], use_reentrant=True))


class WithoutGrad(Plain):
    def features(self, x):
        with torch.no_grad():
            return super().features(x)


class HeadByData(Plain):
    def forward(self, x):
        return functional.linear(self.features(x), self.head.weight.data, self.head.bias)


class Rounded(Plain):
    """A straight-through estimator."""

    def features(self, x):
        features = super().features(x)
        return features + (torch.round(4 * features) / 4 - features).detach()


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(context, inputs, output):
        context.save_for_backward(*inputs)
        context.save_for_forward(*inputs)

    @staticmethod
    def backward(context, gradient):
        return gradient * context.saved_tensors[0].cos()


class SineOnce(_Sine):
    """Its backward hides from autograd that it can be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient * context.saved_tensors[0].cos()


class SineOfConstant(_Sine):
    """Its backward forgets that the cosine depends on x, which only a Hessian asks for."""

    @staticmethod
    def backward(context, gradient):
        return gradient * context.saved_tensors[0].detach().cos()


class SineWrongBackward(_Sine):
    @staticmethod
    def backward(context, gradient):
        return 1.1 * gradient * context.saved_tensors[0].cos()


class SineWrongForwardMode(_Sine):
    @staticmethod
    def jvp(context, tangent):
        return 0.9 * tangent * context.saved_tensors[0].cos()


class OfFunction(Plain):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def features(self, x):
        return self.function.apply(self.hidden(x))


class _CheckpointByHand(torch.autograd.Function):
    """A reentrant checkpoint that somebody wrote for himself: it reads parameters that are not its arguments."""

    @staticmethod
    def forward(context, x, part):
        context.part = part
        context.save_for_backward(x)
        return part(x)

    @staticmethod
    def backward(context, gradient):
        x = context.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            context.part(x).backward(gradient)
        return x.grad, None


class CheckpointByHand(Plain):
    def forward(self, x):
        return _CheckpointByHand.apply(self.features(x), self.head)


class _CosineLinear(nn.Linear):
    def forward(self, x):
        return functional.linear(functional.normalize(x), functional.normalize(self.weight), self.bias)


class CosineHead(Plain):
    def __init__(self):
        super().__init__()
        self.head = _CosineLinear(8, 3)


class SpectralNorm(Plain):
    """Reading ``head.weight`` in training mode is a power iteration."""

    def __init__(self):
        super().__init__()
        self.head = nn.utils.parametrizations.spectral_norm(self.head)
        with torch.no_grad():
            self.head.parametrizations.weight.original.add_(0.5 * torch.randn(3, 8))


class FrozenHead(Plain):
    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)
