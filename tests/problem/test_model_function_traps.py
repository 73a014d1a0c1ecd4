"""Models whose derivatives are silently wrong, or fail, unless care is taken."""

import pytest
import torch
import torch.distributed
from model_checks import EXACT, WAYS, assert_same_state, check_ways, direction_of, double, everything_about
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from whole_model_nets import conv_net, mlp, normal

import fastmeta
from fastmeta.problem.model_function import ModelFunction, Term


class Images(nn.Module):
    """Convolution, a normalization, dropout, linear."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, nn.SiLU(), nn.Dropout(0.2), nn.Flatten())
        self.fc = nn.Linear(4 * 9, 3)

    def forward(self, x):
        return self.fc(self.body(x))


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "batch, no parameters": lambda: nn.BatchNorm2d(4, affine=False),
    "batch, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "sync": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm([4, 3, 3]),
    "rms": lambda: nn.RMSNorm([4, 3, 3]),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("train", [True, False])
def test_normalizations(norm, train, generator):
    model = double(Images(NORMS[norm]()), generator).train(train)
    check_ways(model, normal(generator, 5, 2, 3, 3), direction_of(model, generator))


@pytest.mark.parametrize("name", ["body.1.weight", "body.1.bias", "body.0.weight", "body.0.bias"])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_what_moves(name, train, generator):
    """The rule of forward mode has a branch for each; a bias before the batch's mean moves nothing."""
    model = double(Images(nn.BatchNorm2d(4)), generator).train(train)
    x, v = normal(generator, 5, 2, 3, 3), direction_of(model, generator, names=(name,))
    if train and name == "body.0.bias":
        assert fastmeta.label_gradient(model, x, v).abs().max() < 1e-12
        return
    check_ways(model, x, v)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_the_inputs(train, generator):
    model = double(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), generator).train(train)
    check_ways(model, normal(generator, 5, 3), direction_of(model, generator))


def test_batch_statistics_make_examples_interact(generator):
    """The label gradient of one example depends on the others, in train mode alone."""
    model, make_inputs = conv_net(generator, dropout=0.0)
    x, v = make_inputs(6), direction_of(model, generator)
    for train in (True, False):
        model.train(train)
        together, alone = fastmeta.label_gradient(model, x, v), fastmeta.label_gradient(model, x[:3], v)
        assert torch.allclose(together[:3], alone, rtol=1e-9) != train


def test_one_value_per_channel(generator):
    model = double(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), generator)
    for how in WAYS:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fastmeta.label_gradient(model, normal(generator, 1, 4), direction_of(model, generator), how=how)


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inner = {
            "functional": lambda: nn.Linear(8, 24),
            "multihead": lambda: nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True),
            "layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True),
            "encoder": lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True), 2
            ),
        }[kind]()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        if self.kind == "functional":
            parts = self.inner(x).unflatten(-1, (6, 4)).transpose(1, 2)
            h = functional.scaled_dot_product_attention(*parts.chunk(3, dim=1)).transpose(1, 2).flatten(2)
        elif self.kind == "multihead":
            h, _ = self.inner(x, x, x, need_weights=False)
        elif self.kind == "encoder":
            h = self.inner(x, src_key_padding_mask=torch.arange(5) > torch.arange(len(x)).unsqueeze(1) + 1)
        else:
            h = self.inner(x)
        return self.fc(h.mean(1))


@pytest.mark.parametrize("kind", ["functional", "multihead", "layer", "encoder"])
@pytest.mark.parametrize("train", [True, False])
def test_attention(kind, train, generator):
    model = double(Attention(kind), generator).train(train)
    x = normal(generator, 4, 5, 8)
    check_ways(model, x, direction_of(model, generator))
    term = Term(x, lambda f: f.logsumexp(1).sum(), lambda f, z: z)
    ModelFunction(model).hessian([term])(direction_of(model, generator))


def test_attention_keeps_its_kernel_where_one_derivative_is_enough(generator):
    model, seen = double(Attention("functional"), generator), []
    x, function = normal(generator, 4, 5, 8), ModelFunction(model)

    def look(*_):
        seen.append(torch.backends.cuda.flash_sdp_enabled())

    model.register_forward_hook(look)
    function.logits(x)
    function.gradient(x, torch.sum)
    function.outputs(x)
    assert seen == [True] * 3
    function.jvp(x, direction_of(model, generator))
    function.hessian([Term(x, torch.sum, lambda f, z: z)])
    assert seen[3:] == [False] * 2


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent(kind, generator):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind(4, 5, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(10, 3)

        def forward(self, x):
            return self.fc(self.inner(x)[0].mean(1))

    model = double(Recurrent(), generator)
    x, v = normal(generator, 4, 3, 4), direction_of(model, generator)
    check_ways(model, x, v)
    expected = fastmeta.label_gradient(model, x, v)
    model.float()  # another kernel
    v = {name: value.float() for name, value in v.items()}
    for how in EXACT:
        got = fastmeta.label_gradient(model, x.float(), v, how=how)
        assert (got - expected).norm() <= 1e-4 * expected.norm(), how


@pytest.mark.parametrize(
    "parametrized",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_parametrizations(parametrized, train, generator):
    """Two that finite differences are no way for: spectral norm in train mode iterates on a buffer, under no_grad and
    so a constant to the others; and orthogonal matrices are made with signs that are rounded to integers.
    """
    model = nn.Sequential(double(nn.Linear(4, 6), generator), nn.Tanh(), double(nn.Linear(6, 3), generator))
    with torch.random.fork_rng(devices=[]):
        model[0] = parametrized(model[0])
    model.train(train)
    name = parametrized.__name__
    smooth = name != "orthogonal" and not (train and name == "spectral_norm")
    check_ways(model, normal(generator, 5, 4), direction_of(model, generator), WAYS if smooth else EXACT)


@pytest.mark.parametrize("how", WAYS)
def test_cached_parametrization(how, generator):
    """The caller's cache holds weights of the model's own parameters."""
    model = parametrizations.weight_norm(double(nn.Linear(4, 3), generator))
    x, v = normal(generator, 5, 4), direction_of(model, generator)
    expected = fastmeta.label_gradient(model, x, v, how=how)
    with parametrize.cached():
        logits, kept = model(x), model.weight
        torch.testing.assert_close(fastmeta.label_gradient(model, x, v, how=how), expected)
        assert model.weight is kept
        torch.testing.assert_close(model(x), logits)


def test_parametrized_last_layer(generator):
    model = parametrizations.weight_norm(double(nn.Linear(4, 3), generator))
    with pytest.raises(ValueError, match="last layer's parameters"):
        fastmeta.label_gradient(model, normal(generator, 5, 4), direction_of(model, generator), how="last_layer")


class Of(nn.Module):
    """A linear layer, a function of its output, another layer."""

    def __init__(self, function, generator):
        super().__init__()
        self.function = function
        self.body = double(nn.Linear(4, 5), generator)
        self.fc = double(nn.Linear(5, 3), generator)

    def forward(self, x):
        return self.fc(self.function(self.body(x)))


@pytest.mark.parametrize("constant", ["no_grad", "detach"])
def test_stop_gradient(constant, generator):
    """Forward mode runs on under no_grad; what a model means as a constant is one all the same."""

    def function(h):
        if constant == "detach":
            return h * h.detach().sin()
        with torch.no_grad():
            gate = h.sin()
            gate.mul_(h.cos())
        return h * gate

    model = Of(function, generator)
    x, v = normal(generator, 6, 4), direction_of(model, generator)
    check_ways(model, x, v, EXACT)
    with torch.no_grad():
        check_ways(model, x, v, EXACT)


@torch.library.custom_op("fastmeta_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


twice.register_autograd(lambda ctx, grad: 2 * grad)


@torch.library.custom_op("fastmeta_tests::twice_", mutates_args=("x",))
def twice_(x: torch.Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("fastmeta_tests::rows", mutates_args=())
def rows_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x))


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class WithForwardMode(NoForwardMode):
    @staticmethod
    def forward(x):
        return twice(x)

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


def in_place(h):
    h = h.clone()
    twice_(h)
    return h


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (twice, "fastmeta_tests.twice"),
        (torch.ops.fastmeta_tests.twice, "fastmeta_tests.twice"),
        (in_place, "fastmeta_tests.twice_"),
        (NoForwardMode.apply, "jvp function"),
        (OldStyle.apply, "jvp function"),
    ],
)
def test_operators_without_forward_mode(function, name, generator):
    """They drop the tangent; that is an error, and another way gives the result."""
    model, plain = Of(function, generator), Of(lambda h: 2 * h, generator)
    plain.load_state_dict(model.state_dict())
    x, v = normal(generator, 6, 4), direction_of(model, generator)
    before = everything_about(model)
    with pytest.raises(NotImplementedError, match=f"how='jvp' needs .* use how='double_backward' .*{name}"):
        fastmeta.label_gradient(model, x, v)
    assert_same_state(before, everything_about(model))
    expected = fastmeta.label_gradient(plain, x, v)
    ways = WAYS[2:] if function is in_place else WAYS[1:]
    for how in ways:
        got = fastmeta.label_gradient(model, x, v, how=how, radius=1e-6)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # Where nothing that moves goes through it there is nothing to lose.
    last = {name: value for name, value in v.items() if name.startswith("fc")}
    torch.testing.assert_close(fastmeta.label_gradient(model, x, last), fastmeta.label_gradient(plain, x, last))


@pytest.mark.parametrize("function", [WithForwardMode.apply, lambda h: 2 * h[rows_of(h)], torch.ops.aten.tanh])
def test_operators_with_forward_mode(function, generator):
    model = Of(function, generator)
    check_ways(model, normal(generator, 6, 4), direction_of(model, generator))


def test_checkpointed_model_at_other_parameters(generator):
    """Its backward pass runs the model again, at the same parameters and not at the model's own."""
    plain, make_inputs = mlp(generator)
    x, v = make_inputs(5), direction_of(plain, generator)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, x):
            return plain.fc(checkpoint(lambda h: plain[3](plain[2](plain[1](plain[0](h)))), x, use_reentrant=False))

    term = Term(x, lambda f: f.logsumexp(1).sum(), lambda f, z: f.softmax(1) * z)
    results = []
    for model, prefix in ((plain, ""), (Checkpointed(), "inner.")):
        function = ModelFunction(model)
        w = {prefix + name: value for name, value in v.items()}
        theta = {name: value + w[name] for name, value in function.parameters.items()}
        before = everything_about(model)
        got = [
            function.gradient(x, term.loss, theta)[0],
            function.hessian([term], theta)(w),
            function.gauss_newton([term], theta)(w),
        ]
        assert_same_state(before, everything_about(model))
        results.append([list(vector.values()) for vector in got])
    torch.testing.assert_close(results[1], results[0])
    check_ways(Checkpointed(), x, {f"inner.{name}": value for name, value in v.items()})
