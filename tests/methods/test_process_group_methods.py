"""Directions, derivatives and methods on two processes, with parts of the batch of different sizes, against one."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import forked
import pytest
import torch
import torch.distributed
from cases import Draw
from torch import Tensor, nn

import fastmeta
from fastmeta import derivatives, directions
from fastmeta.ops.process_group import Group
from fastmeta.problem import LastLayerProblem, Problem, Rows, Trajectory, WholeModelProblem
from fastmeta.problem.model_function import ModelFunction

# Examples of process 0, and of all.
PARTS = {"unlabeled": (7, 11), "holdout": (1, 6), "labeled": (5, 5)}
CLASSES, FEATURES, INPUTS = 3, 5, 6
EXAMPLES = 40  # in the unlabeled set
EXACT = ("double_backward", "jvp")
HOWS = (*EXACT, "finite_difference", "forward_difference")
# So well-posed that rounding does not grow from iteration to iteration.
SOLVE = {"damping": 1.0, "tol": 1e-12}


class JoinedBatch(dict[str, Tensor]):
    """All examples, and those of one process."""

    def of(self, rank: int | None) -> "JoinedBatch":
        """``None``: all."""
        if rank is None:
            return self
        cut = {name: PARTS[name.split("_")[0]][0] for name in self}
        return JoinedBatch(
            {name: tensor[: cut[name]] if rank == 0 else tensor[cut[name] :] for name, tensor in self.items()}
        )


def make_batch(draw: Draw) -> JoinedBatch:
    n, nh, nl = (total for _, total in PARTS.values())
    targets = draw.classes(nh, CLASSES)
    targets[[1, 3]] = -100  # left out, both on process 1
    return JoinedBatch(
        unlabeled=draw.normal(n, INPUTS),
        unlabeled_labels=draw.probabilities(n, CLASSES),
        unlabeled_weights=2 * draw.uniform(n),
        unlabeled_mask=(draw.uniform(n) > 0.3).double(),
        unlabeled_index=torch.randint(EXAMPLES, (n,), generator=draw.generator),
        holdout=draw.normal(nh, INPUTS),
        holdout_targets=targets,
        labeled=draw.normal(nl, INPUTS),
        labeled_targets=draw.probabilities(nl, CLASSES),
    )


def make_model(draw: Draw) -> nn.Sequential:
    """In evaluation mode: batch statistics would be those of each process."""
    model = nn.Sequential(
        nn.Linear(INPUTS, FEATURES), nn.BatchNorm1d(FEATURES), nn.Tanh(), nn.Linear(FEATURES, CLASSES)
    )
    model.double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + draw.uniform(*tensor.shape) if tensor.dim() == 1 else draw.normal(*tensor.shape))
    return model


def make_problem(model: nn.Sequential, batch: JoinedBatch, group: Group, whole: bool) -> Problem:
    shared: dict[str, Any] = {
        "targets": batch["holdout_targets"],
        "weights": batch["unlabeled_weights"],
        "mask": batch["unlabeled_mask"],
        "labeled_targets": batch["labeled_targets"],
        "process_group": group,
    }
    views = ("unlabeled", "holdout", "labeled")
    if whole:
        inputs = {name: batch[name] for name in views}
        return WholeModelProblem(ModelFunction(model), impute=batch["unlabeled_labels"], **inputs, **shared)
    with torch.no_grad():
        features = {name: model[:3](batch[name]) for name in views}
        rows = {name: Rows(h, model[3](h)) for name, h in features.items()}
    return LastLayerProblem(labels=batch["unlabeled_labels"], **rows, **shared)


def solver(name: str, **options: Any) -> directions.InverseHessian:
    return directions.InverseHessian(solver=name, **{**SOLVE, "max_iter": 500, **options})


ANYWHERE: dict[str, Callable[[], directions.DirectionRule]] = {
    "hold-out": lambda: directions.HoldoutGradient(),
    "hold-out sum": lambda: directions.HoldoutGradient("mse_probs", reduction="sum"),
    "unit length": lambda: directions.UnitLength(),
    "look-ahead": lambda: directions.LookAhead(directions.UnitLength(), rate=0.3, labeled_weight=0.7),
    "look-ahead 3": lambda: directions.LookAhead(
        rate=0.2, loss="cross_entropy", labeled_weight=0.7, steps=3, momentum=0.9
    ),
    "cg": lambda: solver("cg"),
    "neumann": lambda: solver("neumann", max_iter=20, step=0.05),
    "neumann, own step": lambda: solver("neumann", max_iter=20),
    "gap": lambda: directions.NormalizedGap(decay=0.8, decay_norm=0.7),
    "gap before": lambda: directions.NormalizedGap(decay=0.8, decay_norm=0.7, include_current=False),
}
LAST_LAYER = ANYWHERE | {
    "no bias": lambda: directions.HoldoutGradient(bias=False),
    "factored": lambda: directions.HoldoutGradient(factored=True),
    "factored, no bias": lambda: directions.UnitLength(directions.HoldoutGradient(factored=True, bias=False)),
    "cholesky": lambda: solver("cholesky"),
    "pcg": lambda: solver("pcg"),
    "auto": lambda: solver("auto", loss="mse_probs"),
}
WHOLE_MODEL = ANYWHERE | {
    "hessian": lambda: solver("cg", curvature="hessian", damping=20.0),
    "layers": lambda: solver("cg", layers=("0", "3")),
    "in layers": lambda: directions.InLayers(directions.HoldoutGradient(), ("1",)),
}


def tensors(direction: Any) -> list[Tensor]:
    """Of a direction, or of all of a trajectory's."""
    if isinstance(direction, Trajectory):
        return [tensor for _, step in direction.steps for tensor in tensors(step)]
    direction = direction if isinstance(direction, dict) else dict(enumerate(direction.dense()))
    return [tensor for tensor in direction.values() if tensor is not None]


def all_derivatives(whole: bool) -> Iterator[tuple[str, derivatives.Derivative]]:
    for how in HOWS if whole else ("last_layer",):
        for loss in ("cross_entropy", "mse_probs", "mse_tanh"):
            yield f"labels {how} {loss}", derivatives.LabelGradient(loss, rate=0.5, how=how)
        for reduction in ("mean", "sum"):
            yield f"weights {how} {reduction}", derivatives.ExampleWeightGradient(how=how, reduction=reduction)
        if how not in EXACT:
            yield f"probes {how}", derivatives.FiniteDifference(how=how)


def layers(rank: int, seed: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Of every rule twice (averages move) and of every derivative: this process's result, and all of it alone."""
    draw = Draw(torch.Generator().manual_seed(seed))
    model, batches = make_model(draw), [make_batch(draw) for _ in range(2)]
    world = torch.distributed.group.WORLD
    results = {}
    for whole, rules in ((False, LAST_LAYER), (True, WHOLE_MODEL)):
        level = "model" if whole else "last layer"
        problems = [
            [make_problem(model, batch.of(part), group, whole) for batch in batches]
            for part, group in ((rank, world), (None, None))
        ]
        for name, make in rules.items():
            pair = []
            for given in problems:
                rule = make()
                found = [tensor for problem in given for tensor in tensors(rule(problem))]
                averages = [*getattr(rule, "ema_labeled", []), *getattr(rule, "ema_fourth", [])]
                pair.append(found + [tensor.clone() for tensor in averages])
            results[f"{level}, {name}"] = (pair[0], pair[1])
        for steps in (1, 3):
            rule = directions.LookAhead(rate=0.2, steps=steps, labeled_weight=0.5)
            along = [rule(given[0]) for given in problems]
            for name, derivative in all_derivatives(whole):
                pair = [[derivative(given[0], v)] for given, v in zip(problems, along, strict=True)]
                results[f"{level}, {steps} steps, rows of {name}"] = (pair[0], pair[1])
        if not whole:
            for bias in (False, True):
                rule, similarity = directions.HoldoutGradient(factored=True), derivatives.FeatureSimilarity(bias=bias)
                pair = [[similarity(given[0], rule(given[0]))] for given in problems]
                results[f"{level}, rows of feature similarity, bias {bias}"] = (pair[0], pair[1])
    return results


Maker = Callable[[Group], fastmeta.Method]
TABLE = {"lr": 0.1, "dtype": torch.float64}


def methods() -> dict[str, Maker]:
    """Every method, at the last layer and for the whole model."""
    found: dict[str, Maker] = {}
    for how in ("last_layer", "jvp"):
        layer = how == "last_layer"
        direct = "cholesky" if layer else "cg"
        makers: dict[str, Maker] = {
            "L2I V1": lambda g, how=how: fastmeta.L2I(
                "V1", how=how, look_ahead=True, labeled_weight=0.5, rate=0.3, process_group=g
            ),
            "L2I V2": lambda g, how=how: fastmeta.L2I(
                "V2", how=how, look_ahead=True, steps=2, rate=0.3, process_group=g
            ),
            "MetaGradient": lambda g, how=how: fastmeta.MetaGradient(how=how, step=5.0, rate=0.3, process_group=g),
            "MetaGradient, probes": lambda g, layer=layer: fastmeta.MetaGradient(
                how="last_layer_difference" if layer else "finite_difference", step=0.1, process_group=g
            ),
            "ExampleWeights": lambda g, how=how, direct=direct: fastmeta.ExampleWeights(
                EXAMPLES, how=how, inverse_hessian=direct, process_group=g, **SOLVE, **TABLE
            ),
            "ExampleWeights, shared": lambda g, how=how: fastmeta.ExampleWeights(
                EXAMPLES, how=how, inverse_hessian="identity", shared=True, process_group=g, **TABLE
            ),
            "LabelGradientAlignment": lambda g, how=how: fastmeta.LabelGradientAlignment(
                EXAMPLES, CLASSES, how=how, process_group=g, **TABLE
            ),
            "AlignedImputation": lambda g, how=how: fastmeta.AlignedImputation(how=how, process_group=g),
            "ImputeAndWeight": lambda g, how=how: fastmeta.ImputeAndWeight(
                EXAMPLES, how=how, look_ahead=True, process_group=g, **TABLE
            ),
            "ImplicitImputation": lambda g, how=how, direct=direct: fastmeta.ImplicitImputation(
                "V1", how=how, solver=direct, process_group=g, **SOLVE
            ),
        }
        found |= {f"{name}, {how}": maker for name, maker in makers.items()}
    found["L2I Eq. (6), last_layer"] = lambda g: fastmeta.L2I("V1", derivative="eq6", process_group=g)
    return found


def refine(method: fastmeta.Method, model: nn.Sequential, batch: JoinedBatch) -> fastmeta.Refined:
    given: dict[str, Any] = {
        "targets": batch["holdout_targets"],
        "labeled_targets": batch["labeled_targets"],
        "mask": batch["unlabeled_mask"],
        "index": batch["unlabeled_index"],
    }
    views = {name: batch[name] for name in ("unlabeled", "holdout", "labeled")}
    given["labels"] = (2 * model(views["unlabeled"])).softmax(-1)  # sharpened: its own prediction teaches no weights
    if method.derivative.how in HOWS:
        return method.refine(model=model, **views, **given)
    with fastmeta.capture_features(model) as tape:
        logits = {name: model(inputs) for name, inputs in views.items()}
        return method.refine(**{name: tape.outputs(value) for name, value in logits.items()}, **given)


def flat(state: Any) -> list[Tensor]:
    """The tensors of a state dict, in order."""
    if isinstance(state, Tensor):
        return [state.clone()]
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in flat(value)]


def training(rank: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Two steps of every method, of this process and of one that has all."""
    draw = Draw(torch.Generator().manual_seed(seed))
    model, batches = make_model(draw), [make_batch(draw) for _ in range(2)]
    results: dict[str, list[dict[str, Any]]] = {}
    for name, make in methods().items():
        for part, group in ((rank, torch.distributed.group.WORLD), (None, None)):
            method = make(group)
            rows, gradients = [], []
            for batch in batches:
                refined = refine(method, model, batch.of(part))
                rows.append([refined.labels, refined.weights])
                if refined.loss.requires_grad:
                    gradients.append(torch.autograd.grad(refined.loss, model[0].weight)[0])
            found = {"rows": rows, "gradients": gradients, "state": flat(method.state_dict())}
            results.setdefault(name, []).append(found)
    return results


def distributed_training(rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters after three steps with DistributedDataParallel on halves of the batches, and without on all."""
    draw = Draw(torch.Generator().manual_seed(seed))
    start, x = make_model(draw), draw.normal(3, 12, INPUTS)
    y = draw.classes(18, CLASSES).view(3, 6)
    results = {}
    for how in ("last_layer", "jvp"):
        found = []
        for group in (torch.distributed.group.WORLD, None):
            model = copy.deepcopy(start)
            running = model if group is None else nn.parallel.DistributedDataParallel(model)
            method = fastmeta.L2I(how=how, look_ahead=True, rate=0.3, process_group=group)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for inputs, targets in zip(x, y, strict=True):
                mine = slice(None) if group is None else slice(rank, None, 2)
                x_l, x_u, y_l = inputs[:6][mine], inputs[6:][mine], targets[mine]
                with fastmeta.capture_features(running) as tape:
                    both = tape.outputs(running(torch.cat([x_l, x_u])))
                halves = zip(*(tensor.split(len(x_l)) for tensor in both[:2]), strict=True)
                labeled, unlabeled = (both._replace(features=h, logits=f) for h, f in halves)
                if how == "last_layer":
                    refined = method.refine(holdout=labeled, unlabeled=unlabeled, targets=y_l)
                else:
                    refined = method.refine(model=running, holdout=x_l, unlabeled=x_u, targets=y_l)
                optimizer.zero_grad()
                (nn.functional.cross_entropy(labeled.logits, y_l) + refined.loss).backward()
                optimizer.step()
            found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        results[how] = (found[0], found[1])
    return results


def alone(rank: int, seed: int) -> list[Tensor]:
    """Meta-Gradient with the labeled gradient of each process: in the group, of its examples alone, and of all."""
    draw = Draw(torch.Generator().manual_seed(seed))
    model, batch = make_model(draw), make_batch(draw)
    group = torch.distributed.group.WORLD
    published = fastmeta.MetaGradient.from_preset("official_code", process_group=group)
    joined = fastmeta.MetaGradient.from_preset("official_code", synchronize=True, process_group=group)
    single = fastmeta.MetaGradient.from_preset("official_code")
    return [refine(method, model, batch.of(rank)).labels for method in (published, single, joined)]


@pytest.fixture(scope="module")
def results(module_draw: Draw) -> list[dict[str, Any]]:
    seed = module_draw.integer(0, 2**31)
    return forked.run_each({f.__name__: (f, seed) for f in (layers, training, distributed_training, alone)})


def same(got: Tensor, expected: Tensor) -> bool:
    """The absolute term is for what is zero but for rounding."""
    return got.shape == expected.shape and float((got - expected).norm()) <= 1e-9 * float(expected.norm()) + 1e-15


def test_directions_and_derivatives(results: list[dict[str, Any]]) -> None:
    first, second = (result["layers"] for result in results)
    assert len(first) > 60
    for name, (got, expected) in first.items():
        others, expected_there = second[name]
        assert all(map(same, expected, expected_there)), name
        for one, other, alone in zip(got, others, expected, strict=True):
            assert float(alone.norm()) > 1e-6, f"{name} is all zeros"
            if "rows of" in name:
                assert same(torch.cat([one, other]), alone), name
            else:
                assert same(one, alone), name
                assert same(other, alone), name


def test_the_published_code_of_meta_gradient_does_not_join_its_gradients(results: list[dict[str, Any]]) -> None:
    for published, single, joined in (result["alone"] for result in results):
        assert same(published, single)
        assert not same(joined, single)


def test_methods(results: list[dict[str, Any]]) -> None:
    for name, (first, alone) in results[0]["training"].items():
        second, _ = results[1]["training"][name]
        for *parts, expected in zip(first["rows"], second["rows"], alone["rows"], strict=True):
            for one, other, whole in zip(*parts, expected, strict=True):
                assert same(torch.cat([one, other]), whole), name
        # DistributedDataParallel takes the mean over the processes.
        for one, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
            assert same((one + other) / 2, whole), name
        for one, other, whole in zip(first["state"], second["state"], alone["state"], strict=True):
            assert same(one.double(), whole.double()), name
            assert same(other.double(), whole.double()), name


def test_distributed_data_parallel(results: list[dict[str, Any]]) -> None:
    """V2 through the caller's own backward pass: the gradients are averaged, and the surrogate scaled for it."""
    for result in results:
        for how, (together, alone) in result["distributed_training"].items():
            assert same(together, alone), how
