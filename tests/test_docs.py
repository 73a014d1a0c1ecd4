"""The code of docs/loops.md runs as it is printed, in the package that it is about where that is installed."""

import copy
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import fastmeta
from fastmeta.capture import last_linear

PAGE = (Path(__file__).parents[1] / "docs" / "loops.md").read_text()
BLOCKS = {
    heading: code
    for heading, code in re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
}
M, C, N = 8, 3, 4


def printed(*headings: str) -> dict[str, Any]:
    """The names that the blocks leave behind."""
    names: dict[str, Any] = {"__name__": "page"}
    for heading in ("FixMatch as a function", *headings):
        exec(BLOCKS[heading], names)
    names["fixmatch_loss"].__defaults__ = (0.0,)  # no net here is confident
    return names


def make_net(inputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, C))


def make_batch(seed: int = 0, shape: tuple[int, ...] = (5,)) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weak = torch.randn(N, *shape, generator=draw)
    return {
        "x_l": torch.randn(N, *shape, generator=draw),
        "y_l": torch.randint(C, (N,), generator=draw),
        "x_weak": weak,
        "x_strong": weak + 0.3 * torch.randn(N, *shape, generator=draw),
        "index": torch.randperm(M, generator=draw)[:N],
    }


def loader_of(batches: list[tuple[Tensor, ...]]) -> DataLoader[Any]:
    return DataLoader([row for batch in batches for row in zip(*batch, strict=True)], batch_size=N)


def moved(meta: fastmeta.ImputeAndWeight) -> bool:
    return bool((meta.weights != 1).any())


def test_the_page_and_the_readme_have_one_loop():
    """The function's lines are the README's, but for the threshold and the way the batch is split."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    lines = [
        line.split("  #")[0].strip() for line in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0].split("\n")
    ]
    page = [line.strip() for line in BLOCKS["FixMatch as a function"].replace(">= threshold", ">= 0.95").split("\n")]
    start = lines.index("q = logits_w.softmax(1)")
    assert "\n".join(lines[start:-2]) in "\n".join(page)


def test_a_teacher_or_no_graph():
    names = printed("A weak view under no_grad, or a teacher")
    net, batch = make_net(), make_batch()
    for teacher in (net, copy.deepcopy(net).eval()):
        meta = fastmeta.L2I(inner_loss="cross_entropy")
        loss = names["fixmatch_loss_of_teacher"](net, teacher, meta, **batch, threshold=0.4)
        with torch.no_grad():
            confidence, classes = teacher(batch["x_weak"]).softmax(1).max(1)
            each = functional.cross_entropy(net(batch["x_strong"]), classes, reduction="none")
            fixmatch = functional.cross_entropy(net(batch["x_l"]), batch["y_l"]) + ((confidence >= 0.4) * each).mean()
        surrogate = loss.detach() - fixmatch
        assert abs(float(surrogate)) > 1e-4
        net.zero_grad()
        loss.backward()
        assert bool(net[0].weight.grad.abs().sum() > 0)


def test_save_and_resume(tmp_path):
    names = printed("Save and resume")
    first, second = ((make_net(), fastmeta.ImputeAndWeight(M, lr=0.1)) for _ in range(2))

    def steps(net: nn.Module, meta: fastmeta.Method, seeds: range) -> list[Tensor]:
        return [names["fixmatch_loss"](net, meta, **make_batch(seed)).detach() for seed in seeds]

    steps(*first, range(3))
    names["save"](tmp_path / "state.pt", *first)
    names["resume"](tmp_path / "state.pt", *second)
    assert moved(second[1])
    assert steps(*first, range(3, 6)) == steps(*second, range(3, 6))


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.utilities import CombinedLoader

    names = printed("Lightning")
    batches = [make_batch(seed) for seed in range(3)]
    loaders = {
        "labeled": loader_of([(b["x_l"], b["y_l"]) for b in batches]),
        "unlabeled": loader_of([(b["x_weak"], b["x_strong"], b["index"]) for b in batches]),
    }

    def fit(epochs: int, checkpoint: str | None = None) -> tuple[Any, Any]:
        module = names["FixMatch"](make_net(), fastmeta.ImputeAndWeight(M, lr=0.1))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=tmp_path, **quiet)
        trainer.fit(module, CombinedLoader(loaders, "min_size"), ckpt_path=checkpoint)
        return module, trainer

    straight, _ = fit(2)
    half, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, str(tmp_path / "half.ckpt"))
    assert moved(half.meta)
    assert not torch.equal(half.meta.weights, straight.meta.weights)
    assert torch.equal(resumed.meta.weights, straight.meta.weights)
    for one, other in zip(resumed.net.parameters(), straight.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names = printed("Hugging Face Trainer")
    draw = torch.Generator().manual_seed(0)

    def texts() -> dict[str, Tensor]:
        return {"input_ids": torch.randint(20, (N, 6), generator=draw), "attention_mask": torch.ones(N, 6).long()}

    labeled = [
        {"input_ids": row, "labels": torch.tensor(i % C)} for i, row in enumerate(texts()["input_ids"].repeat(4, 1))
    ]

    def unlabeled() -> Any:
        while True:
            yield texts(), texts(), torch.randperm(M, generator=draw)[:N]

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, num_labels=C, **size))
    meta = fastmeta.ImputeAndWeight(M, lr=0.1)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=N,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = names["FixMatchTrainer"](
        model,
        arguments,
        train_dataset=labeled,
        eval_dataset=labeled,
        meta=meta,
        unlabeled=unlabeled(),
        threshold=0.0,
        callbacks=[names["SaveMethod"](meta)],
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert moved(meta)
    saved = fastmeta.ImputeAndWeight(M, lr=0.1)
    saved.load_state_dict(torch.load(tmp_path / "checkpoint-2" / "meta.pt"))
    assert moved(saved)
    assert not torch.equal(saved.weights, meta.weights), "one step older"


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    names = printed("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net, meta = make_net(), fastmeta.ImputeAndWeight(M, lr=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = loader_of([tuple(make_batch(seed).values()) for seed in range(3)])
    before = net[2].weight.clone()
    names["train"](net, meta, optimizer, loader, accelerator)
    assert not torch.equal(net[2].weight, before)
    assert moved(meta)
    accelerator.save_state(str(tmp_path / "state"))
    weights = meta.weights.clone()
    meta.weights.fill_(1.0)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(meta.weights, weights)


class UsbStandIn:
    """What the step takes from USB's base class, for where USB is not installed."""

    lambda_u = 1.0

    def __init__(self) -> None:
        self.model = _WithLogits()

    def amp_cm(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def compute_prob(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def call_hook(self, function: str, name: str, *, logits_x_ulb: Tensor, softmax_x_ulb: bool) -> Tensor:
        assert (function, name, softmax_x_ulb) == ("masking", "MaskingHook", False)
        return (logits_x_ulb.amax(1) >= 0.4).to(logits_x_ulb.dtype)

    def ce_loss(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return functional.cross_entropy(logits, targets, reduction=reduction)

    def process_out_dict(self, **out: Any) -> dict[str, Any]:
        return out

    process_log_dict = process_out_dict

    def get_save_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict()}

    def load_model(self, load_path: str) -> Any:
        return torch.load(load_path)


class _WithLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(inputs)}


def test_a_teacher_that_learns():
    """Two clouds with a label each: the student, which sees no label itself, comes to tell them apart."""
    step = printed("A teacher that learns")["meta_pseudo_labels_step"]
    draw = torch.Generator().manual_seed(0)
    classes = torch.randint(2, (64,), generator=draw)
    x_u = torch.randn(64, 5, generator=draw) + 6.0 * classes.unsqueeze(1)
    x_l, y_l = torch.tensor([0.0, 6.0]).unsqueeze(1).expand(2, 5), torch.tensor([0, 1])
    teacher, student = make_net(), make_net()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (teacher, student)]
    meta = fastmeta.MetaPseudoLabels(how="jvp", rate=0.1)
    for _ in range(150):
        step(teacher, student, meta, *optimizers, x_l, y_l, x_u)
    for net in (teacher, student):
        assert float((net(x_u).argmax(1) == classes).float().mean()) > 0.95


def test_usb(monkeypatch, tmp_path):
    module = types.ModuleType("semilearn.algorithms.fixmatch")
    module.FixMatch = UsbStandIn  # type: ignore[attr-defined]
    for name in ("semilearn", "semilearn.algorithms"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = printed("USB")["RefinedFixMatch"]
    made.meta = fastmeta.ImputeAndWeight(M, lr=0.1)
    algorithm, batch = made(), make_batch()
    names = {"x_l": "x_lb", "y_l": "y_lb", "x_weak": "x_ulb_w", "x_strong": "x_ulb_s", "index": "idx_ulb"}
    out, _ = algorithm.train_step(**{names[key]: value for key, value in batch.items()})
    out["loss"].backward()
    assert bool(algorithm.model.net[0].weight.grad.isfinite().all())
    assert moved(made.meta)
    torch.save(algorithm.get_save_dict(), tmp_path / "usb.pt")
    weights, made.meta = made.meta.weights.clone(), fastmeta.ImputeAndWeight(M)
    algorithm.load_model(tmp_path / "usb.pt")
    assert torch.equal(made.meta.weights, weights)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext"])
def test_timm(name, monkeypatch):
    timm = pytest.importorskip("timm")
    small = timm.create_model(name, num_classes=C, **({"img_size": 32} if "vit" in name else {}))
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: small)
    names = printed("timm")
    assert last_linear(small)[0] is small.get_classifier()
    before = small.get_classifier().weight.clone()
    assert bool(names["step"](**make_batch(shape=(3, 32, 32))).isfinite())
    assert not torch.equal(small.get_classifier().weight, before)


def test_the_function_compiled():
    loss_of = printed()["fixmatch_loss"]
    compiled = torch.compile(loss_of, backend="eager")
    net, plain, traced = make_net(), *(fastmeta.ImputeAndWeight(M, lr=0.1) for _ in range(2))
    for seed in range(2):
        losses = loss_of(net, plain, **make_batch(seed)), compiled(net, traced, **make_batch(seed))
        grads = [torch.autograd.grad(loss, net[0].weight)[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[name], value)
