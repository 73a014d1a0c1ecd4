"""The benchmark of data: a tiny run of everything it measures."""

import numpy as np
import torch

from bench import augment, data, files
from bench.__main__ import main
from bench.pillow_operations import PILLOW
from bench.pillow_views import PillowPairs
from fastmeta.data import ImageDataset


def test_a_run_measures_every_way(tmp_path, monkeypatch, capsys):
    for name, value in {"STORED": 1000, "BATCH": 20, "JPEG_BATCH": 2}.items():
        monkeypatch.setattr(data, name, value)
    threads = torch.get_num_threads()
    arguments = ["--rounds", "1", "--seconds", "0.001", "--files", "4", "--out", str(tmp_path)]
    assert main(["data", *arguments]) == 0
    assert torch.get_num_threads() == threads
    found = files.read(tmp_path / "data.json")
    assert list(found["rates"]) == [data.PAIRS, data.JPEGS]
    measured = [rates for ways in found["rates"].values() for rates in ways.values()]
    assert len(measured) == 7
    assert all(len(rates) == 1 and min(rates) > 0 for rates in measured)
    assert 0 < found["random_numbers_us"] < 1e5
    assert "Pillow in two workers" in (tmp_path / "data.md").read_text()
    assert "fastmeta, two workers" in capsys.readouterr().out


def test_the_peer_flips_shifts_and_cuts_out():
    pixels = np.random.default_rng(0).integers(0, 100, (1, 3, 32, 32), dtype=np.uint8)
    peer = PillowPairs(ImageDataset("one", torch.from_numpy(pixels), torch.zeros(1, dtype=torch.int64), 1))
    source = torch.from_numpy(pixels[0])
    padded = torch.nn.functional.pad(source.float().unsqueeze(0), (4, 4, 4, 4), mode="reflect")[0]
    both = (padded, padded.flip(2))
    windows = [image[:, y : y + 32, x : x + 32] for image in both for y in range(9) for x in range(9)]
    weak, strong = zip(*(peer[0] for _ in range(40)), strict=True)
    assert all(any(view.float().equal(window) for window in windows) for view in weak)
    assert len({view.numpy().tobytes() for view in weak}) > 20
    assert all(int((view == 127).all(dim=0).sum()) >= 64 for view in strong)  # cut off at the border


def test_views_are_measured_at_both_sides(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(augment, "BATCHES", {16: 4, 24: 2})
    threads = torch.get_num_threads()
    assert main(["augment", "--rounds", "1", "--seconds", "0.001", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    found = files.read(tmp_path / "augment.json")
    assert list(found["rates"]) == ["16 px, weak + strong pairs", "24 px, weak + strong pairs"]
    for rates in found["rates"].values():
        assert len(rates) >= 5
        assert all(len(each) == 1 and min(each) > 0 for each in rates.values())
    assert set(found["operations"]["16"]) == set(PILLOW)
    assert "rescale-hamming" in (tmp_path / "augment.md").read_text()
    assert "fastmeta, two threads" in capsys.readouterr().out
