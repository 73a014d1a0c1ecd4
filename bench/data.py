"""How fast images come: pairs of views at 32 pixels from a memory map, and JPEG files at 224.

Pairs: a weak and a strong view of every image of a batch of 448, read through a Stream and augmented by fastmeta's
views for pictures; beside it what users have, Pillow image by image in a DataLoader's workers. JPEG: files of 500 x 375
decoded to squares of 256 by a Stream with two workers; beside it two processes that do nothing but Pillow's decoding,
resizing and cropping. All in turn, several times; medians and best rates. Writes data.json and data.md.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from bench import environment, files, text
from bench.operators import RESULTS
from bench.pillow_views import PillowPairs, decoded
from fastmeta.data import ImageDataset, Images, KeyedRandom, StatelessSampler, Stream, open_images, views_for

SCHEMA_VERSION = 1
BATCH = 448  # FixMatch's unlabeled batch
JPEG_BATCH = 64
STORED = 50_000  # images in the memory map, as many as CIFAR-10 has
PAIRS, JPEGS = "32 px, weak + strong pairs", "JPEG 500 x 375 to 256 px"

Rates = dict[str, Callable[[], float]]  # a way's name to what measures its images/s once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a measurement, about (%(default)s)")
    parser.add_argument("--files", type=int, default=400, help="JPEG files (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where images are stored (the temporary folder)")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment.describe(),
        "settings": {"rounds": options.rounds, "seconds": options.seconds, "files": options.files},
        "load_average_before": os.getloadavg(),
        "random_numbers_us": 1e6 * _best_seconds(_draw),
        "permutation_of_1281167_ms": 1e3 * _best_seconds(_permute),
        "rates": {},
    }
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measured = {
            PAIRS: pairs(_memory_map(Path(name) / "images.npy"), options.seconds),
            JPEGS: jpegs(_jpeg_files(Path(name) / "jpeg", options.files), options.seconds),
        }
        for task, ways in measured.items():
            results["rates"][task] = interleaved(ways, options.rounds)
            torch.set_num_threads(threads)
    folder = options.out or RESULTS / environment.machine_name()
    files.write(folder / "data.json", results)
    report = "\n".join(text.table_of(rows(results)))
    (folder / "data.md").write_text(report)
    print(f"{report}\nin {folder}")
    return 0


def interleaved(ways: Rates, rounds: int) -> dict[str, list[float]]:
    """Images/s of each way, all in turn, forward in one round and backward in the next."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            found[name].append(ways[name]())
    return found


def pairs(images: Images, seconds: float) -> Rates:
    """Ways to get pairs of views; the first is the peer."""

    def ours(threads: int, workers: int) -> float:
        torch.set_num_threads(threads)
        views = views_for("pictures", images.image_shape, images.image_shape[-1])
        stream = Stream(images, torch.arange(len(images)), batch_size=BATCH, seed=0, name="unlabeled", workers=workers)

        def batches() -> Iterator[int]:
            for rows in stream:
                for name, view in (("weak", views.weak), ("strong", views.strong)):
                    view(rows.images, KeyedRandom(0, "unlabeled", name, rows.keys))
                yield len(rows.keys)

        with closing(stream):
            return rate(batches(), seconds)

    def pillow(workers: int) -> float:
        torch.set_num_threads(1)
        endless = RandomSampler(range(len(images)), replacement=True, num_samples=10**9)
        loader = DataLoader(PillowPairs(images), batch_size=BATCH, sampler=endless, num_workers=workers)

        def batches() -> Iterator[int]:
            for weak, strong in loader:
                for view in (weak, strong):
                    view.float().div_(255)
                yield len(weak)

        return rate(batches(), seconds, warm_up=2 * workers)

    return {
        "Pillow in two workers": partial(pillow, 2),
        "Pillow in the process": partial(pillow, 0),
        "fastmeta, one thread": partial(ours, 1, 0),
        "fastmeta, two threads": partial(ours, 2, 0),
        "fastmeta, two threads and a worker": partial(ours, 2, 1),
    }


def jpegs(folder: Path, seconds: float) -> Rates:
    """Ways to decode files; the first is the peer."""
    paths = sorted(folder.rglob("*.jpg"))

    def bare() -> float:
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            return sum(pool.map(partial(_decode_for, seconds), [paths[::2], paths[1::2]], chunksize=1))

    def ours() -> float:
        images = open_images(folder, image_size=224, cache=False)
        stream = Stream(images, torch.arange(len(images)), batch_size=JPEG_BATCH, seed=0, name="unlabeled", workers=2)
        with closing(stream):
            return rate((len(rows.keys) for rows in stream), seconds, warm_up=6)

    return {"Pillow alone in two processes": bare, "fastmeta, two workers": ours}


def rate(batches: Iterator[int], seconds: float, warm_up: int = 1) -> float:
    """Images/s after the first batches, of which workers have prepared some while they were waited for."""
    for _ in range(warm_up):
        next(batches)
    count, begin = 0, time.perf_counter()
    for size in batches:
        count += size
        if time.perf_counter() - begin > seconds:
            break
    return count / (time.perf_counter() - begin)


def _decode_for(seconds: float, paths: list[Path]) -> float:
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        decoded(paths[count % len(paths)])
        count += 1
    return count / (time.perf_counter() - begin)


def _memory_map(path: Path) -> ImageDataset:
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (STORED, 3, 32, 32))
    random = np.random.default_rng(0)
    for start in range(0, STORED, 1000):
        pixels[start : start + 1000] = random.integers(0, 256, (1000, 3, 32, 32), dtype=np.uint8)
    pixels.flush()
    stored = torch.from_numpy(np.load(path, mmap_mode="c"))
    return ImageDataset("random", stored, torch.zeros(STORED, dtype=torch.int64), 1)


def _jpeg_files(folder: Path, count: int) -> Path:
    """Cuts of scikit-learn's two photographs, 500 x 375 as ImageNet's are on average."""
    from sklearn.datasets import load_sample_images

    random, photographs = np.random.default_rng(0), [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        place = folder / str(number % 2) / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        left, top = (int(random.integers(0, room)) for room in (140, 52))
        photographs[number % 2].crop((left, top, left + 500, top + 375)).save(place, quality=90)
    return folder


def _draw() -> None:
    KeyedRandom(0, "unlabeled", "strong", torch.arange(BATCH)).uniform(40)


def _permute() -> None:
    StatelessSampler(1_281_167, BATCH, seed=0, stream="unlabeled").batch(0)


def _best_seconds(call: Callable[[], None]) -> float:
    def once() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return min(once() for _ in range(5))


def rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """The table of the report."""
    found = []
    for task, rates in results["rates"].items():
        peer = statistics.median(next(iter(rates.values())))
        for way, measured in rates.items():
            median = statistics.median(measured)
            found.append(
                {
                    "task": task,
                    "way": way,
                    "images/s": f"{median:,.0f}",
                    "best": f"{max(measured):,.0f}",
                    "to the first": text.factor(median / peer),
                }
            )
    return found
