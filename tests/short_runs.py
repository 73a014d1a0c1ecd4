"""Short runs on digits, and what makes two of them the same."""

from pathlib import Path
from typing import Any

import torch

from fastmeta.training import EvaluationConfig, MachineConfig


def small(**machine: Any) -> dict[str, Any]:
    """Settings of a run of nine steps."""
    return {
        "steps": 9,
        "labeled_batch": 10,
        "unlabeled_batch": 12,
        "evaluation": EvaluationConfig(every=3),
        "machine": MachineConfig(checkpoint_every=4, threads=1, **machine),
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = tensors(folder), tensors(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    for name in ("metrics.jsonl", "details.json", "unlabeled.csv", "results.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
