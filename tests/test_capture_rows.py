"""tape.outputs: which rows of the layer's outputs some logits are, whatever a loop has done to them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastmeta import MetaGradient, Outputs, capture_features

N, T, D, C = 12, 3, 5, 4
SHUFFLED = torch.tensor([7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 4, 6])
LAST = torch.tensor([0, 2, 1, 1, 2, 0, 2, 2, 1, 0, 0, 1])


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, D), nn.Tanh())
        self.fc = nn.Linear(D, C, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.body(inputs))


@pytest.fixture
def inputs(generator) -> Tensor:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return torch.randn(N, 6, dtype=torch.float64)


def interleave(f: Tensor, size: int) -> Tensor:
    return f.reshape(-1, size, *f.shape[1:]).transpose(0, 1).reshape(f.shape)


def put_in_place(f: Tensor) -> Tensor:
    whole = torch.zeros_like(f)
    whole[SHUFFLED] = f
    return whole


def halves_swapped_in_place(f: Tensor) -> Tensor:
    whole = torch.zeros_like(f)
    whole[: N // 2], whole[N // 2 :] = f[N // 2 :], f[: N // 2]
    return whole


SELECTIONS = {
    "index": lambda f: f[SHUFFLED],
    "index_select": lambda f: f.index_select(0, SHUFFLED[:5]),
    "mask": lambda f: f[SHUFFLED > 4],
    "one row by index": lambda f: f[[3]],
    "no row by index": lambda f: f[SHUFFLED[:0]],
    "de-interleaved": lambda f: interleave(f, 3)[:4],
    "cast of a part": lambda f: f[2:8].split([1, 5])[1].float(),
    "part of a cast": lambda f: f.float()[8:].chunk(2)[1],
    "cast and cast back": lambda f: f[SHUFFLED].bfloat16().float(),
    "cloned": lambda f: f.clone(),
    "joined": lambda f: torch.cat([f[6:], f[:6]]),
    "stacked rows": lambda f: torch.stack(f.unbind(0)[::-1]),
    "rolled and flipped": lambda f: f.roll(2, 0).flip(0),
    "gathered": lambda f: f.gather(0, SHUFFLED[:, None].expand_as(f)),
    "index_put": lambda f: torch.zeros_like(f).index_put((SHUFFLED,), f),
    "put in place": put_in_place,
    "halves in place": halves_swapped_in_place,
    "where": lambda f: torch.where(torch.ones(N, 1, dtype=torch.bool), f, f.detach()),
}
OF_TOKENS = {
    "first token": lambda f: f[:, 0],
    "last token of each": lambda f: f[torch.arange(N), LAST],
    "tokens that count": lambda f: f.flatten(0, 1)[torch.arange(N * T) % 5 > 0],
}


def assert_moves_like(outputs: Outputs, logits: Tensor, fc: nn.Linear) -> None:
    """The derivative of any function of the logits by the layer is that of its features."""
    cotangent = torch.rand_like(logits)
    parameters = [parameter for parameter in fc.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(logits, parameters, cotangent, retain_graph=True)
    got = (cotangent.T.double() @ outputs.features, cotangent.double().sum(0))
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if logits.dtype == torch.float64 else {"rtol": 5e-2, "atol": 1e-1}
    for g, e in zip(got, expected, strict=False):
        torch.testing.assert_close(g, e, **tolerance)


def assert_is_head(outputs: Outputs) -> None:
    given = nn.functional.linear(outputs.features, outputs.weight, outputs.bias)
    torch.testing.assert_close(given.to(outputs.logits.dtype), outputs.logits.detach(), rtol=1e-2, atol=1e-2)


def numbers(cut: Callable[[Tensor], Tensor]) -> Tensor:
    """Which rows the cut takes."""
    return cut(torch.arange(N, dtype=torch.float64)[:, None]).flatten().long()


@pytest.mark.parametrize("cut", SELECTIONS.values(), ids=SELECTIONS)
def test_rows_by_the_graph(inputs, cut):
    net = Net().double()
    with capture_features(net) as tape:
        logits = cut(net(inputs))
    outputs = tape.outputs(logits)
    assert outputs.logits is logits
    assert torch.equal(outputs.features, net.body(inputs)[numbers(cut)])
    assert_moves_like(outputs, logits, net.fc)
    assert_is_head(outputs)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("cut", OF_TOKENS.values(), ids=OF_TOKENS)
def test_rows_of_token_logits(inputs, cut, grad):
    net, texts = Net().double(), inputs[:, None] + torch.arange(T)[None, :, None]
    with capture_features(net) as tape, torch.set_grad_enabled(grad):
        logits = cut(net(texts))
    assert torch.equal(tape.outputs(logits).features, cut(net.body(texts)).detach())


@pytest.mark.parametrize("cut", SELECTIONS.values(), ids=SELECTIONS)
def test_rows_by_values(inputs, cut):
    net = Net().double()
    with capture_features(net) as tape, torch.no_grad():
        logits = cut(net(inputs))
    if cut is SELECTIONS["cast and cast back"]:
        with pytest.raises(RuntimeError, match=r"are not rows.*rows=index"):
            tape.outputs(logits)
    else:
        assert torch.equal(tape.outputs(logits).features, net.body(inputs)[numbers(cut)])


def test_values_with_nan_and_in_half_precision(inputs):
    net = Net().bfloat16()
    net.fc.bias.data[1] = torch.nan
    with capture_features(net) as tape, torch.no_grad():
        logits = net(inputs.bfloat16())[SHUFFLED].float()
    assert torch.equal(tape.outputs(logits).features, net.body(inputs.bfloat16())[SHUFFLED])


def test_values_that_cannot_tell(inputs):
    """A head that starts at zero gives equal rows for different features; a graph, or the caller, knows which."""
    net = Net().double()
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    with capture_features(net) as tape, torch.no_grad():
        logits = net(inputs)[SHUFFLED]
    with pytest.raises(RuntimeError, match=r"equal values have different features.*rows=index"):
        tape.outputs(logits)
    expected = net.body(inputs)[SHUFFLED]
    assert torch.equal(tape.outputs(logits, rows=SHUFFLED).features, expected)
    with capture_features(net) as tape:
        logits = net(inputs)[SHUFFLED]
    assert torch.equal(tape.outputs(logits).features, expected)


def test_rows_of_several_calls(inputs):
    net = Net().double()
    with capture_features(net) as tape:
        first, second, _ = net(inputs), net(inputs + 1), net(inputs + 2)
        logits = torch.cat([second, first[SHUFFLED]])[3:]
    outputs = tape.outputs(logits)
    assert torch.equal(outputs.features, net.body(torch.cat([inputs + 1, inputs[SHUFFLED]]))[3:])
    assert_moves_like(outputs, logits, net.fc)
    rows = torch.cat([N + torch.arange(N), SHUFFLED])[3:]
    assert torch.equal(tape.outputs(logits, rows=rows).features, outputs.features)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_one_example_at_a_time(inputs, grad):
    net = Net().double()
    with capture_features(net) as tape, torch.set_grad_enabled(grad):
        logits = [net(example) for example in inputs]
    features = torch.stack([net.body(example) for example in inputs])
    assert torch.equal(tape.outputs(torch.stack(logits)[SHUFFLED]).features, features[SHUFFLED])
    assert torch.equal(tape.outputs(logits[3][None]).features, features[3:4])
    assert torch.equal(tape.outputs(torch.stack(logits), rows=torch.arange(N)).features, features)


def test_rows_in_inference_mode(inputs):
    net = Net().double()
    with capture_features(net) as tape, torch.inference_mode():
        logits = net(inputs)[SHUFFLED]
    for rows in (None, SHUFFLED):
        assert torch.equal(tape.outputs(logits, rows=rows).features, net.body(inputs)[SHUFFLED])


def test_rows_chosen_in_a_compiled_model(inputs):
    """Its graph is hidden; the values tell."""
    torch._dynamo.reset()
    net = Net().double()
    compiled = torch.compile(lambda x: net(x)[SHUFFLED].float(), backend="aot_eager")
    with capture_features(net) as tape:
        logits = compiled(inputs)
    outputs = tape.outputs(logits[2:])
    torch.testing.assert_close(outputs.features, net.body(inputs)[SHUFFLED][2:].detach())
    assert outputs.logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_and_columns(inputs, dtype):
    """Their numbers take several digits, each of which half precision carries."""
    layer = nn.Linear(D, 70, bias=False).to(dtype)
    features, order = torch.randn(2100, D, dtype=dtype), torch.randperm(2100)
    with capture_features(layer) as tape:
        logits = layer(features)[order]
    assert torch.equal(tape.outputs(logits).features, features[order])
    with pytest.raises(RuntimeError, match="are not rows"):
        tape.outputs(logits[:, [1, 0, *range(2, 70)]])


FACTORS = {
    "temperature": (lambda f: f / 0.07, 1 / 0.07),
    "learned temperature": (lambda f: f[SHUFFLED] * nn.Parameter(torch.tensor(0.5)).exp(), torch.tensor(0.5).exp()),
    "negative": (lambda f: -f, -1.0),
    "shifted": (lambda f: 3 * f + torch.arange(C), 3.0),
    "from a constant": (lambda f: 1 - f, -1.0),
}


@pytest.mark.parametrize("case", FACTORS.values(), ids=FACTORS)
def test_one_factor(inputs, case):
    change, factor = case
    net = Net(bias=False).double()
    with capture_features(net) as tape:
        logits = change(net(inputs))
    outputs = tape.outputs(logits)
    order = SHUFFLED if isinstance(factor, Tensor) else slice(None)
    torch.testing.assert_close(outputs.features, float(factor) * net.body(inputs).detach()[order])
    assert_moves_like(outputs, logits, net.fc)
    if outputs.weight is not None:
        assert_is_head(outputs)
    assert (outputs.weight is None) == (case in (FACTORS["shifted"], FACTORS["from a constant"]))


def test_a_factor_needs_a_bias_that_does_not_move(inputs):
    net = Net().double()
    with capture_features(net) as tape:
        logits = net(inputs) / 2
    with pytest.raises(RuntimeError, match=r"0\.5 times its rows, and its bias"):
        tape.outputs(logits)
    net.fc.bias.requires_grad_(False)
    outputs = tape.outputs(logits)
    assert outputs.bias is None
    assert outputs.weight is None
    assert_moves_like(outputs, logits, net.fc)


def test_constants_do_not_move(inputs):
    """Logit adjustment: the derivative is that of the layer alone, but its weight does not give the logits."""
    net = Net().double()
    with capture_features(net) as tape:
        logits = net(inputs) + torch.arange(C)
    outputs = tape.outputs(logits)
    assert outputs.weight is None
    assert torch.equal(outputs.bias, net.fc.bias)
    assert_moves_like(outputs, logits, net.fc)


REFUSED = {
    "softmax": (lambda f: f.softmax(1), "SoftmaxBackward0 lies between"),
    "with softmax added": (lambda f: f + f.softmax(1), "SoftmaxBackward0 lies between"),
    "log_softmax": (lambda f: f.log_softmax(1), "LogSoftmaxBackward0 lies between"),
    "softcap": (lambda f: 30 * torch.tanh(f / 30), "TanhBackward0 lies between"),
    "square": (lambda f: f * f, "MulBackward0 of several outputs"),
    "reciprocal": (lambda f: 1 / f, "ReciprocalBackward0 lies between"),
    "divided into": (lambda f: f.detach() / f, "DivBackward0"),
    "normalized": (lambda f: f / f.norm(dim=1, keepdim=True), "lies between"),
    "mean of tokens": (lambda f: f.view(4, 3, C).mean(1), "MeanBackward1 lies between"),
    "sum of rows": (lambda f: f[:6] + f[6:], "12 of its rows, not 6"),
    "mean with other rows": (lambda f: (f + f[SHUFFLED]) / 2, "other sums or multiples"),
    "mean of neighbors": (lambda f: (f.roll(1, 0) + f.roll(-1, 0)) / 2, "other sums or multiples"),
    "a factor for each class": (lambda f: f * torch.tensor([1, 1, 1, 1.001]), "other sums or multiples"),
    "a factor for each row": (lambda f: f * torch.linspace(0.999, 1, N)[:, None], "other sums or multiples"),
    "dropped rows": (lambda f: f * (torch.arange(N) % 2)[:, None], "6 of its rows, not 12"),
    "classes swapped": (lambda f: f[:, [1, 0, 2, 3]], "other sums or multiples"),
    "classes of one row swapped": (lambda f: f[[3]][:, [1, 0, 2, 3]], "other sums or multiples"),
    "transposed": (lambda f: f[:C].T, "are not rows"),
    "rows repeated": (lambda f: f.repeat(2, 1), "12 of its rows, not 24"),
    "a row expanded": (lambda f: f[:1].expand(4, C), "1 of its rows, not 4"),
    "constant rows added": (lambda f: torch.cat([f, torch.zeros(2, C)]), "12 of its rows, not 14"),
    "detached in part": (lambda f: torch.cat([f[:6], f[6:].detach()]), "6 of its rows, not 12"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero-head"])
def test_what_is_no_selection_is_refused(inputs, case, zero):
    """By what lies between, not by the numbers: at a head of zeros the slope of tanh is 1."""
    change, reason = case
    net = Net(bias=False).double()
    if zero:
        nn.init.zeros_(net.fc.weight)
    with capture_features(net) as tape:
        logits = change(net(inputs))
    with pytest.raises(RuntimeError, match=f"{reason}.*") as error:
        tape.outputs(logits)
    assert "are not rows of any output of the layer 'fc'" in str(error.value)
    assert "fastmeta.Outputs(features, logits, weight, bias)" in str(error.value)


WITH_PARAMETERS = {
    "divided by the norm": lambda f, fc: f / fc.weight.norm(),
    "bias twice": lambda f, fc: f + fc.bias,
    "mean of the weight": lambda f, fc: f[SHUFFLED] - fc.weight.mean(1),
}


@pytest.mark.parametrize("change", WITH_PARAMETERS.values(), ids=WITH_PARAMETERS)
def test_logits_that_depend_on_the_parameters_otherwise_are_refused(inputs, change):
    net = Net().double()
    with capture_features(net) as tape:
        logits = change(net(inputs), net.fc)
    with pytest.raises(RuntimeError, match="they depend on its parameters in another way, too"):
        tape.outputs(logits)


def test_the_search_leaves_no_trace(inputs):
    """Neither hooks of others nor retained gradients see it, and the graph stays for the backward pass."""
    net = Net().double()
    with capture_features(net) as tape:
        whole = net(inputs)
        logits = whole[SHUFFLED]
    whole.retain_grad()
    logits.retain_grad()
    seen = []
    handle = logits.register_hook(seen.append)
    tape.outputs(logits)
    assert whole.grad is None
    assert logits.grad is None
    assert net.fc.weight.grad is None
    assert not seen
    handle.remove()
    logits.sum().backward()
    # Afterwards the graph is freed, and values tell.
    assert torch.equal(tape.outputs(logits).features, net.body(inputs)[SHUFFLED])


GIVEN_ROWS = {
    "index": (SHUFFLED[:4], slice(None)),
    "negative step": (SHUFFLED.flip(0), slice(None)),
    "slice": (slice(2, 9, 3), slice(None)),
    "mask": (SHUFFLED > 4, slice(None)),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("rows", [rows for rows, _ in GIVEN_ROWS.values()], ids=GIVEN_ROWS)
def test_given_rows(inputs, rows, grad):
    net = Net().double()
    with capture_features(net) as tape, torch.set_grad_enabled(grad):
        logits = net(inputs)[rows].float()
    assert torch.equal(tape.outputs(logits, rows=rows).features, net.body(inputs)[rows])


BAD_ROWS = {
    "other rows": (SHUFFLED.flip(0), ValueError, "rows must give logits: these rows of the output of the layer 'fc'"),
    "too few": (SHUFFLED[1:], ValueError, r"rows must choose \[12, 4\] like logits, got \[11, 4\]"),
    "too large": (SHUFFLED + 1, ValueError, r"rows must be in \[0, 12\)"),
    "negative": (SHUFFLED - 1, ValueError, r"rows must be in \[0, 12\)"),
    "short mask": (SHUFFLED[1:] >= 0, ValueError, "rows must be a mask of the 12 rows of the outputs, got 11"),
    "list": ([0, 1], TypeError, "rows must be an int64 tensor .*, got list"),
    "float": (SHUFFLED.double(), TypeError, r"rows must be an int64 tensor .*, got torch.float64 \[12\]"),
    "matrix": (SHUFFLED[:, None], TypeError, r"rows must be an int64 tensor .*, got torch.int64 \[12, 1\]"),
}


@pytest.mark.parametrize("case", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_do_not_fit(inputs, case):
    rows, error, message = case
    net = Net().double()
    with capture_features(net) as tape:
        logits = net(inputs)[SHUFFLED]
    with pytest.raises(error, match=message):
        tape.outputs(logits, rows=rows)


def test_a_step_on_an_interleaved_forward(inputs):
    """The labels are those of separate forwards."""
    net, targets = Net().double(), torch.tensor([0, 1, 2, 3])
    with capture_features(net) as tape:
        labeled, unlabeled = net(inputs[:4]), net(inputs[4:])
    expected = MetaGradient().refine(unlabeled=tape.outputs(unlabeled), holdout=tape.outputs(labeled), targets=targets)
    with capture_features(net) as tape:
        logits = interleave(net(interleave(inputs, 3)), 4)
    got = MetaGradient().refine(unlabeled=tape.outputs(logits[4:]), holdout=tape.outputs(logits[:4]), targets=targets)
    torch.testing.assert_close(got.labels, expected.labels, rtol=1e-12, atol=1e-14)
