"""capture_features: what a last linear layer may be, and what it leaves of the layer."""

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fastmeta import L2I, MetaGradient, capture_features, label_gradient

N, D, C = 6, 5, 3


def make(head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, D), nn.Tanh(), head)


@pytest.fixture
def inputs(generator) -> Tensor:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return torch.randn(N, 4)


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(input), nn.functional.normalize(self.weight), self.bias)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Adapted(nn.Linear):
    """A frozen weight and a low-rank one beside it, which starts at zero, in one layer."""

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__(num_features, num_outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, num_features)), nn.Parameter(torch.zeros(num_outputs, 2))
        self.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


class InFull(nn.Linear):
    """Another way to compute the same, with other arguments and an object around the result."""

    def forward(self, *, hidden: Tensor, scale: float = 1.0) -> dict[str, Tensor | None]:
        return {"loss": None, "logits": hidden @ self.weight.T + self.bias}


class Named(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return self[2](hidden=self[1](self[0](inputs)))["logits"]


@pytest.mark.parametrize("head", [Cosine, Scaled])
def test_a_layer_that_computes_something_else_is_refused(inputs, head):
    model = make(head(D, C))
    with capture_features(model) as tape:
        logits = model(inputs)
    message = rf"features weight\^T \+ bias, but with the forward of {head.__name__} it is not.*how='jvp'"
    with pytest.raises(ValueError, match=message):
        tape.outputs(logits)
    direction = {"2.weight": torch.ones(C, D)}
    with pytest.raises(ValueError, match=message):
        label_gradient(model, inputs, direction, how="last_layer")
    assert label_gradient(model, inputs, direction, how="jvp").shape == (N, C)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_forward_that_computes_the_same_is_taken(inputs, dtype, autocast):
    model = Named(nn.Linear(4, D), nn.Tanh(), InFull(D, C)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), capture_features(model) as tape:
        logits = model(inputs.to(dtype))
    outputs = tape.outputs(logits[2:])
    assert torch.equal(outputs.features, tape.calls[0][0][2:])
    assert torch.equal(outputs.weight, model[2].weight)


def test_an_adapter_inside_the_layer_is_refused_from_the_start(inputs):
    """While it is zero the output is that of the frozen weight, which does not move."""
    model = make(Adapted(D, C))
    with capture_features(model) as tape:
        logits = model(inputs)
    with pytest.raises(ValueError, match="must require grad, but it is frozen"):
        tape.outputs(logits)
    model[2].weight.requires_grad_()
    nn.init.ones_(model[2].up)
    with capture_features(model) as tape:
        logits = model(inputs)
    with pytest.raises(ValueError, match="the forward of Adapted"):
        tape.outputs(logits)


class Adapter(nn.Module):
    """A frozen layer and a low-rank one beside it, as layers of their own."""

    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.base = nn.Linear(D, C).requires_grad_(False)
        self.down, self.up, self.scaling = nn.Linear(D, 2, bias=False), nn.Linear(2, C, bias=False), scaling

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.up(self.down(input)) * self.scaling


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_an_adapter_on_the_head(inputs, scaling):
    """The upper of its layers moves; the labels are those of differentiating by its weight."""
    model, targets = make(Adapter(scaling)).double(), torch.tensor([0, 1, 2])
    inputs = inputs.double()
    with capture_features(model) as tape:
        logits = model(inputs)[torch.tensor([5, 4, 3, 2, 1, 0])]
    outputs = tape.outputs(logits[3:])
    head = model[2]
    assert outputs.weight is None
    torch.testing.assert_close(outputs.features, scaling * head.down(model[:2](inputs))[:3].flip(0).detach())

    weight = head.up.weight
    gradient = torch.autograd.grad(nn.functional.cross_entropy(logits[:3], targets), weight, retain_graph=True)[0]
    direction = {"2.up.weight": gradient}
    for how in ("jvp", "last_layer"):
        expected = label_gradient(model, inputs[:3].flip(0), direction, how="double_backward")
        torch.testing.assert_close(label_gradient(model, inputs[:3].flip(0), direction, how=how), expected)
    refined = MetaGradient().refine(unlabeled=outputs, holdout=tape.outputs(logits[:3]), targets=targets)
    method = MetaGradient(how="last_layer")
    by_model = method.refine(model=model, unlabeled=inputs[:3].flip(0), holdout=inputs[3:].flip(0), targets=targets)
    torch.testing.assert_close(by_model.labels, refined.labels)


def test_a_frozen_head_is_refused(inputs):
    model, targets = make(nn.Linear(D, C)), torch.zeros(N, dtype=torch.long)
    model[2].weight.requires_grad_(False)
    with capture_features(model) as tape:
        logits = model(inputs)
    with pytest.raises(ValueError, match=r"weight of the layer '2'.* must require grad, but it is frozen.*how='jvp'"):
        tape.outputs(logits)
    assert torch.equal(tape.calls[0][0], model[:2](inputs))
    with pytest.raises(ValueError, match="must require grad, but it is frozen"):
        L2I(how="last_layer").refine(model=model, unlabeled=inputs, holdout=inputs, targets=targets)


def test_a_weight_that_trains_without_gradients_is_not_frozen(inputs):
    model = make(nn.Linear(D, C)).eval()
    with torch.no_grad(), capture_features(model) as tape:
        assert tape.outputs(model(inputs)).bias is not None


def test_a_frozen_bias_does_not_move(inputs):
    """The labels are those of a model in which nothing but the head's weight moves."""
    model, inputs, targets = make(nn.Linear(D, C)).double(), inputs.double(), torch.tensor([0, 1, 2, 0, 1, 2])
    model[2].bias.requires_grad_(False)
    model[0].requires_grad_(False)
    with capture_features(model) as tape:
        logits = model(inputs)
    outputs = tape.outputs(logits)
    assert outputs.bias is None
    assert outputs.weight is None
    refined = MetaGradient().refine(unlabeled=outputs, holdout=outputs, targets=targets)
    for how in ("last_layer", "double_backward"):
        expected = MetaGradient(how=how).refine(model=model, unlabeled=inputs, holdout=inputs, targets=targets)
        torch.testing.assert_close(refined.labels, expected.labels)
    assert not torch.allclose(refined.labels, logits.softmax(1))


class Pooled(nn.Sequential):
    """Logits of the last token of each text, as classifiers on language models give them."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs[:, None] * torch.arange(1, 4)[None, :, None])
        return logits[torch.arange(len(inputs)), torch.arange(len(inputs)) % 3]


def test_a_pooled_head_that_starts_at_zero(inputs):
    """Values cannot tell its rows, but ``refine`` with a model sees a graph where it needs one."""
    model, targets = Pooled(*make(nn.Linear(D, C))), torch.tensor([0, 1, 2, 0, 1, 2])
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    with capture_features(model) as tape:
        logits, others = model(inputs), model(inputs + 1)
    expected = MetaGradient().refine(unlabeled=tape.outputs(others), holdout=tape.outputs(logits), targets=targets)
    method = MetaGradient(how="last_layer")
    got = method.refine(model=model, unlabeled=inputs + 1, holdout=inputs, targets=targets)
    torch.testing.assert_close(got.labels, expected.labels)
    assert not torch.allclose(got.labels, torch.full((N, C), 1 / C))


WRAPPED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}
for name in ("weight_norm", "spectral_norm"):
    WRAPPED[f"{name} by hooks"] = getattr(nn.utils, name)


def wrapped(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Twice the same model, in training mode, after a step that its state lags behind."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make(WRAPPED[name](nn.Linear(D, C)))
        model(torch.ones(2, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        models.append(model)
    return models[0], models[1]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", WRAPPED)
def test_the_weight_is_that_of_the_forward(inputs, name):
    """It is computed anew, or its state moves, each time that it is read."""
    model, plain = wrapped(name)
    with capture_features(model) as tape:
        logits = model(inputs)
    outputs = tape.outputs(logits)
    assert torch.equal(logits, plain(inputs))
    torch.testing.assert_close(nn.functional.linear(outputs.features, outputs.weight, outputs.bias), logits.detach())
    assert not outputs.weight.requires_grad
    label_gradient(model, inputs, {"2.bias": torch.ones(C)}, how="last_layer")
    assert model.state_dict().keys() == plain.state_dict().keys()
    for value, expected in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected)
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match="it is frozen"):
        tape.outputs(logits)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_copy_of_a_parametrized_head(inputs, name):
    model, plain = wrapped(name)
    with capture_features(model) as tape:
        first = model(inputs)
        copied = copy.deepcopy(model)
        saved = model.state_dict()
        torch.save(saved, io.BytesIO())
        with pytest.raises(RuntimeError, match="only supported through state_dict"):  # as without the block
            pickle.dumps(model)
        second = model(inputs)
    assert tape.outputs(first).features.shape == tape.outputs(second).features.shape
    assert copied[2].__dict__.keys() == plain[2].__dict__.keys()
    assert [cls.__name__ for cls in type(copied[2]).__mro__] == [cls.__name__ for cls in type(plain[2]).__mro__]
    assert saved.keys() == plain.state_dict().keys()
    plain(inputs)
    assert torch.equal(copied(inputs), plain(inputs))


def test_compiled_parametrized_head(inputs):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = wrapped("spectral_norm")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        with capture_features(compiled) as tape:
            logits = compiled(inputs)
        torch.testing.assert_close(logits, plain(inputs))
        outputs = tape.outputs(logits)
        torch.testing.assert_close(outputs.features @ outputs.weight.T + outputs.bias, logits.detach())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def patched(layer: nn.Linear) -> None:
    """As accelerate's hooks do it: the bound forward inside a function on the layer."""
    forward = layer.forward

    @functools.wraps(forward)
    def new_forward(*args, **kwargs):
        return forward(*args, **kwargs)

    layer.forward = new_forward


def bound(layer: nn.Linear) -> None:
    """As accelerate leaves it when its hooks are taken off."""
    layer.forward = layer.forward


def tupled(layer: nn.Linear) -> None:
    forward = layer.forward
    layer.forward = lambda input, *rest: (None, forward(input))


@pytest.mark.parametrize("patch", [patched, bound, tupled])
def test_a_forward_on_the_layer(inputs, patch):
    model = make(nn.Linear(D, C))
    patch(model[2])
    before = dict(model[2].__dict__)
    with capture_features(model) as tape:
        logits, copied = model(inputs), copy.deepcopy(model)
        model(inputs + 1)
    assert model[2].__dict__ == before
    assert type(model[2]) is type(copied[2]) is nn.Linear
    assert copied[2].__dict__.keys() == before.keys()
    outputs = tape.outputs(logits[1] if patch is tupled else logits)
    assert torch.equal(outputs.features, model[:2](inputs))
    assert torch.equal(outputs.weight, model[2].weight)


@pytest.mark.parametrize("patch", [patched, bound])
def test_a_forward_on_the_layer_of_a_compiled_model(inputs, patch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(nn.Linear(D, C))
    patch(model[2])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        with capture_features(compiled) as tape:
            logits = [compiled(inputs), compiled(inputs)]
        assert torch.equal(tape.outputs(logits[1][2:]).features, model[:2](inputs)[2:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_forward_on_the_layer_that_computes_something_else(inputs):
    model = make(nn.Linear(D, C))
    forward = model[2].forward
    model[2].forward = lambda input: 2 * forward(input)
    with capture_features(model) as tape:
        logits = model(inputs)
    with pytest.raises(ValueError, match=r"with a forward set on the layer itself .* it is not"):
        tape.outputs(logits)
    model[2].forward = lambda input: None
    message = r"did not run .* it has a forward set on the layer itself"
    with pytest.raises(RuntimeError, match=message), capture_features(model):
        model(inputs)


def test_a_weight_that_is_taken_away_after_the_call(inputs):
    """As offloading does it."""
    model = make(nn.Linear(D, C))
    forward = model[2].forward

    def offloaded(input):
        output = forward(input)
        model[2].weight = nn.Parameter(model[2].weight.to("meta"))
        return output

    model[2].forward = offloaded
    with capture_features(model) as tape:
        logits = model(inputs)
    with pytest.raises(ValueError, match="its weight is not there after the call"):
        tape.outputs(logits)


def test_a_patch_taken_off_in_the_block(inputs):
    model = make(nn.Linear(D, C))
    patched(model[2])
    with capture_features(model) as tape:
        logits = model(inputs)
        del model[2].forward
        later = model(inputs)
    assert "forward" not in model[2].__dict__
    for f in (logits, later):
        assert tape.outputs(f).logits is f


def replicated(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for each device: parameters become plain tensors on the graph."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicated(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter.clone())
    return replica


def test_replicas_in_threads(inputs):
    model = make(nn.Linear(D, C))
    parts: list[Tensor | None] = [None] * 2
    with capture_features(model) as tape:
        replicas = [replicated(model) for _ in parts]

        def work(place: int) -> None:
            parts[place] = replicas[place](inputs[3 * place : 3 * place + 3])

        threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        logits = torch.cat(parts)
    outputs = tape.outputs(logits[1:])
    torch.testing.assert_close(outputs.features, model[:2](inputs)[1:].detach())
    assert torch.equal(outputs.bias, model[2].bias)
    assert type(model[2]) is nn.Linear


def test_data_parallel_without_devices(inputs):
    model = nn.DataParallel(make(nn.Linear(D, C)))
    with capture_features(model) as tape:
        logits = model(inputs)
    assert torch.equal(tape.outputs(logits).features, model.module[:2](inputs))


@pytest.mark.parametrize("settings", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel_that_copies_the_logits(inputs, settings, process_group):
    model = make(nn.Linear(D, C))
    parallel = nn.parallel.DistributedDataParallel(model, **settings)
    with capture_features(parallel) as tape:
        logits = parallel(inputs)
    for part in (slice(None), slice(2, 4), torch.tensor([4, 1])):
        assert torch.equal(tape.outputs(logits[part]).features, model[:2](inputs)[part])
    logits.sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_rows_of_a_checkpointed_model(inputs, reentrant):
    model = make(nn.Linear(D, C))
    inputs.requires_grad_()
    with capture_features(model) as tape:
        logits = torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=reentrant).double()[[4, 1]]
    torch.testing.assert_close(tape.outputs(logits).features, model[:2](inputs)[[4, 1]])


def test_backward_hooks_of_the_layer_do_not_run(inputs):
    model, ran = make(nn.Linear(D, C)), []
    model[2].register_full_backward_hook(lambda *arguments: ran.append(1))
    with capture_features(model) as tape:
        logits = model(inputs)[[3, 0]]
    torch.testing.assert_close(tape.outputs(logits).features, model[:2](inputs)[[3, 0]])
    assert not ran
