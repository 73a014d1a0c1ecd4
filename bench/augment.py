"""How fast views are made: pairs of a weak and a strong one, and operation by operation.

A pair: flip and shift, and the same with RandAugment as FixMatch's code has it. Beside fastmeta's: Pillow, image by
image, in the process and in a DataLoader's workers, and where they import kornia and torchvision, which draw operations
once for a whole batch: no paper means that. All in turn, several times; medians and best rates. Then each operation, a
batch in one thread, beside Pillow's. Writes augment.json and augment.md.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

import fastmeta
from bench import environment, files, text
from bench.data import Rates, interleaved, rate, rows
from bench.operators import RESULTS
from bench.pillow_operations import PILLOW, Operation, to_image
from bench.pillow_views import PillowPairs
from fastmeta.data import ImageDataset, KeyedRandom, Shift
from fastmeta.data.augment import CODES, OPERATIONS, RandAugment, apply_operations

SCHEMA_VERSION = 1
BATCHES = {32: 448, 224: 32}
USED = {16.0: 1.9, 8.0: 4.0, 8192.0: 5.0, 360.0: 30.0, 256.0: 128.0, 16384.0: 16.0}  # levels, in place of bounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a measurement, about (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment.describe(),
        "settings": {"rounds": options.rounds, "seconds": options.seconds, "batches": BATCHES},
        "load_average_before": os.getloadavg(),
        "rates": {},
        "operations": {},
    }
    for side, count in BATCHES.items():
        pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        pixels = pixels // 3 + 80  # as photographs have it, not all values come
        results["rates"][f"{side} px, weak + strong pairs"] = interleaved(
            pairs(pixels, options.seconds), options.rounds
        )
        torch.set_num_threads(1)
        results["operations"][side] = by_operation(pixels, options.seconds / 20)
        torch.set_num_threads(threads)
    results["load_average_after"] = os.getloadavg()
    folder = options.out or RESULTS / environment.machine_name()
    files.write(folder / "augment.json", results)
    report = "\n".join([*text.table_of(rows(results)), "", *text.table_of(operation_rows(results))])
    (folder / "augment.md").write_text(report)
    print(f"{report}\nin {folder}")
    return 0


def pairs(pixels: Tensor, seconds: float) -> Rates:
    """Ways to get pairs of views of a batch; the first is the peer."""
    count, side = len(pixels), pixels.shape[3]
    weak = Shift(side, side // 8, "reflected", flip=True)
    strong = RandAugment(side, "google", weak)

    def ours(threads: int, impl: str) -> float:
        torch.set_num_threads(threads)

        def batches() -> Iterator[int]:
            for step in range(10**9):
                keys = torch.arange(step * count, (step + 1) * count)
                both = [
                    view(pixels, KeyedRandom(0, "unlabeled", name, keys))
                    for name, view in (("weak", weak), ("strong", strong))
                ]
                yield len(both[0])

        with fastmeta.use_impl(impl):
            return rate(batches(), seconds)

    def pillow(workers: int) -> float:
        torch.set_num_threads(1)
        images = ImageDataset("random", pixels, torch.zeros(count, dtype=torch.int64), 1)
        endless = RandomSampler(range(count), replacement=True, num_samples=10**9)
        loader = DataLoader(PillowPairs(images), batch_size=count, sampler=endless, num_workers=workers)

        def batches() -> Iterator[int]:
            for views in loader:
                for view in views:
                    view.float().div_(255)
                yield count

        return rate(batches(), seconds, warm_up=2 * workers)

    def per_batch(make: Callable[[int], Callable[[Tensor], Any]], threads: int) -> float:
        torch.set_num_threads(threads)
        view = make(side)
        return rate((len(view(pixels)) and count for _ in range(10**9)), seconds)

    ways: Rates = {
        "Pillow in two workers": partial(pillow, 2),
        "Pillow in the process": partial(pillow, 0),
        "fastmeta in PyTorch, two threads": partial(ours, 2, "reference"),
        "fastmeta, one thread": partial(ours, 1, "cpp"),
        "fastmeta, two threads": partial(ours, 2, "cpp"),
    }
    for name, make in {"kornia": kornia_views, "torchvision": torchvision_views}.items():
        try:
            make(side)
        except (ImportError, RuntimeError):
            continue
        ways[f"{name}, two threads (one draw a batch)"] = partial(per_batch, make, 2)
    return ways


def kornia_views(side: int) -> Callable[[Tensor], Any]:
    """Both views of a batch."""
    from kornia import augmentation

    crop = augmentation.RandomCrop((side, side), padding=side // 8, padding_mode="reflect")
    weak = torch.nn.Sequential(augmentation.RandomHorizontalFlip(), crop)
    strong = augmentation.auto.RandAugment(n=2, m=10)
    erased = augmentation.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0), value=0.5)

    def views(pixels: Tensor) -> Any:
        images = pixels.float() / 255
        return weak(images), erased(strong(weak(images)))

    return views


def torchvision_views(side: int) -> Callable[[Tensor], Any]:
    """Both views of a batch."""
    from torchvision.transforms import v2

    weak = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(side, padding=side // 8, padding_mode="reflect")])
    strong = v2.RandAugment(2, 9)
    erased = v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0), value=127)

    def views(pixels: Tensor) -> Any:
        return weak(pixels).float().div_(255), erased(strong(weak(pixels))).float().div_(255)

    return views


def by_operation(pixels: Tensor, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds an image in one thread: Pillow's without and ours with the way from and to a batch's memory."""
    few, found = [to_image(each) for each in pixels[:32]], {}
    for name, operation in PILLOW.items():
        high = float(OPERATIONS[name].high)
        level = USED.get(high, high)
        codes, levels = (torch.full((len(pixels), 1), value) for value in (CODES[name], level))
        found[name] = {
            "Pillow": _best(partial(_each, operation, few, level), seconds) / len(few),
            "fastmeta": _best(partial(apply_operations, pixels, codes, levels), seconds) / len(pixels),
        }
    return found


def _each(operation: Operation, images: list[Image.Image], level: float) -> None:
    for image in images:
        operation(image, level)


def _best(call: Callable[[], object], seconds: float) -> float:
    """Microseconds of this process: it has one thread, and others may want the processor."""
    best, end = math.inf, time.process_time() + seconds
    while time.process_time() < end or best == math.inf:
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return 1e6 * best


def operation_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """The table of the operations."""
    table = []
    for name in PILLOW:
        row = {"operation, us an image": name}
        for side, found in results["operations"].items():
            for way, time_of in found[name].items():
                row[f"{way} {side} px"] = f"{time_of:.1f}"
        table.append(row)
    return table
