"""Presets: what the papers print, the parts of their data, the list, and the command line."""

import dataclasses
import json
import os

import pytest
import torch

from fastmeta import cli
from fastmeta.data import ImageDataset
from fastmeta.data.landmarks import Landmarks
from fastmeta.models import build_model
from fastmeta.presets import PRESETS, preset
from fastmeta.presets.preset import CLASSES
from fastmeta.training.build import resolve, split_of
from fastmeta.training.config import RunConfig, from_dict

# Images of a class for training, where the data sets have as many of each; SVHN's 73,257 are taken as if they had.
EACH = {"cifar-10": 5000, "cifar-100": 500, "svhn": 7325, "fashion-mnist": 6000, "tiny-imagenet": 500}


def config(name):
    return PRESETS[name].config


def error(name):
    found = PRESETS[name].error
    assert found is not None
    return found


def gain(arm, dataset, labels):
    """What the method takes off its baseline's error, in points."""
    return error(f"{arm}-alone-{dataset}-{labels}") - error(f"{arm}-{dataset}-{labels}")


def test_landmarks_as_the_papers_say():
    # "for 22500 steps and set the initial learning rate to 0.03 and reduce it by 0.1 at 15,000 steps"
    run = config("l2i-v2-mt-aflw-91")
    assert (run.steps, run.optimizer.learning_rate, run.schedule.milestones) == (22_500, 0.03, (15_000,))
    # "increase the unsupervised loss weight to 3 in 9000 steps", and in the first version to 1
    assert run.settings()["base_settings"]["ramp"] * run.steps == 9000
    assert [config(f"l2i-{name}-aflw-91").base_settings["weight"] for name in ("v2-mt", "v1-mt-v2")] == [3, 1]
    # "the approximate update rule performs better in AFLW"; "V1 outperforms V2"
    assert error("l2i-v2-mt-aflw-182") < error("l2i-v2-mt-exact-aflw-182")
    assert error("l2i-v1-pl-v1-aflw-455") < error("l2i-v1-pl-v2-aflw-455")
    assert config("l2i-v2-mt-l-aflw-91").method_settings["inner_loss"] == "mse"
    # "randomly pick 10% (1012 images) of samples of the original training set", 10,122; 91 labels are 1% of the rest
    images = Landmarks(
        "aflw", torch.zeros(10_122, 1, 1, 1), torch.rand(10_122, 10), {"train": torch.arange(10_122)}, [""] * 10_122
    )
    sizes = split_of(resolve(run, images), images).sizes()
    assert sizes == {"labeled": 91, "unlabeled": 9110, "holdout": 0, "validation": 1012, "test": 0}
    assert split_of(resolve(config("l2i-v1-sl-alone-aflw-all"), images), images).sizes()["labeled"] == 9110


def test_learning_to_impute_v1_as_the_paper_says():
    # "significant improvement over MT baseline, especially in the low label regime, up-to 11 points"
    mean_teacher = [error(f"l2i-v1-mt-{variant}-cifar10-250") for variant in ("alone", "v2")]
    assert mean_teacher[0] - mean_teacher[1] == pytest.approx(11.18)
    # "40 x 1000 steps", "increases gradually to 75 in 40 x (1000 x 0.4) steps"
    run = config("l2i-v1-pl-v2-cifar10-250")
    assert (run.steps, run.labeled_batch, run.unlabeled_batch) == (40_000, 50, 50)
    assert run.optimizer.learning_rate == 0.003
    assert run.settings()["base_settings"]["weight"] == 75
    assert run.settings()["base_settings"]["ramp"] * run.steps == 16_000
    assert config("l2i-v1-pl-v1-cifar100-500").labeled_batch == 128
    # "25, 50, 100 samples [...] 43.4 %, 43.74 % and 43.72 % respectively while V2 attains 42.7 %, 42.51 % and 42.47 %"
    assert config("l2i-v1-pl-v2-holdout-100-cifar10-250").holdout_batch == 100
    assert error("l2i-v1-pl-v2-holdout-100-cifar10-250") == 42.47
    # "decrease the learning rate at 80 and 100 epoch", "from 0 to 100 in 48 epochs", 95,000 images in batches of 512
    tiny = config("l2i-v1-mm-v2-tiny-imagenet-5pct")
    assert tiny.steps == 120 * 185
    assert tiny.schedule.milestones == (80 * 185, 100 * 185)
    assert tiny.settings()["base_settings"]["ramp"] * 120 == pytest.approx(48)
    assert tiny.settings()["method_settings"]["derivative"] == "eq6"
    # "MT+V2 obtains 80.63 and MM+V2 achieves 76.72 testing error rate"
    assert error("l2i-v1-mt-v2-tiny-imagenet-5pct") == 80.63
    assert error("l2i-v1-mm-v2-tiny-imagenet-5pct") == 76.72


def test_learning_to_impute_v2_as_the_paper_says():
    # "up-to 12 points in case of 250 labels in CIFAR-10", "6% and 3% improvement in case of 500 labels in CIFAR-100"
    assert gain("l2i-v2-mt", "cifar10", 250) == pytest.approx(11.78)
    assert gain("l2i-v2-mm", "cifar100", 500) == pytest.approx(6.30)
    assert gain("l2i-v2-fm", "cifar100", 500) == pytest.approx(3.35)
    run = config("l2i-v2-mt-cifar10-250")
    assert (run.labeled_batch, run.unlabeled_batch, run.average.decay) == (64, 64, 0.999)
    assert (run.steps, run.evaluation.every, run.evaluation.report) == (1024 * 1024, 1024, "median-of-last-20")
    settings = run.settings()["method_settings"]
    assert (settings["variant"], settings["derivative"], settings["two_views"]) == ("V2", "eq6", True)
    assert config("l2i-v2-mt-exact-cifar10-250").settings()["method_settings"]["how"] == "jvp"
    assert config("l2i-v2-fm-l-cifar10-250").settings()["method_settings"]["variant"] == "V1"
    assert PRESETS["l2i-v2-mt-cifar10-1000"].note == "Table 8: 15.76%."
    rate = config("l2i-v2-fm-cifar100-500").optimizer
    assert (rate.name, rate.learning_rate, rate.momentum, rate.weight_decay) == ("sgd", 0.03, 0.9, 0.001)
    # "vary the hold-out mini-batch size to 32, 64 and 128", "3 labels per class for training and 2 for hold-out"
    assert config("l2i-v2-fm-holdout-32-cifar100-500").holdout_batch == 32
    separate = config("l2i-v2-fm-separate-cifar100-500")
    assert (separate.labels_per_class, separate.split.holdout_per_class) == (3, 2)
    # 120 passes of 1,217,167 images in batches of 768, a tenth of the rate every 30; "around 3%"
    imagenet = config("l2i-v2-fm-imagenet-5pct")
    assert imagenet.labels_per_class == 64
    assert imagenet.steps == 120 * 1584
    assert [imagenet.steps / step for step in imagenet.schedule.milestones] == pytest.approx([4, 2, 4 / 3])
    assert imagenet.settings()["base_settings"]["weight"] == 10.0
    assert imagenet.augmentation.strong == "randaugment-google"
    assert gain("l2i-v2-fm", "imagenet", "5pct") == pytest.approx(3.25)
    assert config("l2i-v2-sl-alone-imagenet-all").steps == 120 * 5004


def test_reviews_as_the_papers_say():
    # "obtains significantly better performance than the UDA (i.e. 9.19 vs 9.82)"
    assert [error(f"l2i-v2-{arm}-imdb-20") for arm in ("uda", "uda-alone")] == [9.19, 9.82]
    run = config("l2i-v2-uda-imdb-20")
    assert (run.labels_per_class, run.labeled_batch, run.unlabeled_batch, run.holdout_batch) == (10, 8, 24, 8)
    assert (run.steps, run.schedule.warm_up, run.optimizer.learning_rate, run.image_size) == (10_000, 1_000, 2e-5, 128)
    # "20 labeled samples for the supervised training set and another 20 for validation"
    assert config("weights-uda-imdb-20").split.holdout_per_class == 10
    assert error("weights-uda-imdb-20") == 8.51


def test_meta_gradient_as_the_slides_and_the_code_say():
    run = config("meta-gradient-svhn-1000")
    assert (run.steps, run.schedule.warm_up, run.schedule.milestones) == (400_000, 4_000, (300_000, 350_000))
    assert run.settings()["base_settings"]["ramp"] * run.steps == 4_000
    assert run.settings()["base_settings"]["alpha"] == 0.1
    assert (run.augmentation.flip, run.optimizer.weight_decay) == (False, 5e-5)
    assert config("meta-gradient-cifar100-10000").labels_per_class == 100
    assert PRESETS["meta-gradient-cifar10-4000"].table == "Small Datasets; Ablation"
    arms = ("neither-alone", "no-mix-up", "mix-up-alone")
    assert [config(f"meta-gradient-{arm}-cifar10-4000").base_settings["mix_up"] for arm in arms] == [0, 0, 1]
    assert [error(f"meta-gradient-{arm}-cifar10-4000") for arm in arms] == [15.43, 11.63, 11.10]
    # 600 passes of the 1,153,167 unlabeled images in batches of 512
    imagenet = config("meta-gradient-imagenet-10pct")
    assert imagenet.labels_per_class == 128
    assert imagenet.steps == 600 * 2252
    assert imagenet.schedule.warm_up * 120 == imagenet.steps
    resnet_50 = config("meta-gradient-resnet-50-imagenet-10pct")
    assert resnet_50 == dataclasses.replace(imagenet, model="resnet-50")


def test_example_weights_as_the_paper_says():
    settings = config("weights-uda-cifar10-4000").settings()["method_settings"]
    assert (settings["interval"], settings["lr"], settings["low"], settings["high"]) == (100, 0.01, 0, 2)
    assert PRESETS["weights-uda-cifar10-4000"].note == "Table 3: 3.42%. A validation error. Fig. 3: 4.43%."
    # "test error of 4.43%, outperforming 4.51% and 4.85% by Luketina et al. and Lorraine et al."
    assert [error(f"weights-uda-{form}-cifar10-4000") for form in ("identity", "neumann")] == [4.51, 4.85]
    # "outperforms the UDA baseline across all splits in both CIFAR-10 and SVHN"
    for dataset in ("cifar10", "svhn"):
        assert all(gain("weights-uda", dataset, labels) > 0 for labels in (250, 500, 1000, 2000, 4000))
    # "per-example weighting is able to improve upon the original FixMatch baseline results over all splits"
    assert all(
        gain("weights-fixmatch", dataset, labels) > 0 for dataset in ("cifar10", "svhn") for labels in (250, 4000)
    )
    run = config("weights-fixmatch-cifar10-250")
    assert (run.augmentation.strong, run.labeled_batch, run.unlabeled_batch) == ("ctaugment", 64, 448)
    assert run.split.holdout == 1024
    assert PRESETS["weights-fixmatch-alone-cifar10-250"].note == "Table 1: 5.07%. In FixMatch's own paper."
    # as in their code, CTAugment's rates learn for FixMatch alone
    assert [config(f"weights-fixmatch{arm}-svhn-250").augmentation.adapt for arm in ("", "-alone")] == [False, True]
    # 3,000 passes of 128,000 labeled images in batches of 1,024
    imagenet = config("weights-fixmatch-imagenet-10pct")
    assert imagenet.labels_per_class + imagenet.split.holdout_per_class == 128
    assert imagenet.steps == 3000 * 125


def test_label_gradient_alignment_as_the_paper_says():
    run = config("lga-cifar10-4000")
    assert (run.steps, run.schedule.milestones, run.schedule.factor) == (500_000, (400_000,), 0.2)
    assert run.augmentation.whitening == "zca"
    assert (run.base, run.base_settings["soft"]) == ("pseudo-label", True)
    assert run.settings()["method_settings"]["ramp_steps"] == 200_000
    assert config("lga-vat-svhn-1000").base == "vat"
    assert PRESETS["lga-vat-svhn-1000"].table == "Table 1; Fig. 6"
    # "state-of-the-art accuracy on CIFAR-10 with 4000 labels", with VAT
    best = min(
        cell.error for name, cell in PRESETS.items() if name.startswith("lga") and cell.error and "cifar10" in name
    )
    assert best == error("lga-vat-cifar10-4000") == 12.06
    assert PRESETS["lga-fashion-mnist-250"].error is None


@pytest.fixture(scope="module")
def images():
    """As many as the data sets have, of one pixel."""
    found = {}
    for dataset, each in EACH.items():
        targets = torch.arange(CLASSES[dataset]).repeat(each + 1)
        places = torch.arange(len(targets))
        end = each * CLASSES[dataset]
        parts = {"train": places[:end], "test": places[end:]}
        pixels = torch.zeros(len(targets), 3, 1, 1, dtype=torch.uint8)
        found[dataset] = ImageDataset(dataset, pixels, targets, CLASSES[dataset], parts)
    return found


def test_the_parts_of_the_data(images):
    """Of every preset on small images: as many labels as its name says, and all images in a part."""
    sizes = {}
    for name, cell in PRESETS.items():
        if cell.dataset not in EACH:
            continue
        run = resolve(cell.config, images[cell.dataset])
        key = (cell.dataset, run.labels_per_class, run.split)
        if key not in sizes:
            sizes[key] = split_of(run, images[cell.dataset]).sizes()
        found = dict(sizes[key])
        word = name.rsplit("-", 1)[-1]
        every = EACH[cell.dataset] * CLASSES[cell.dataset]
        labels = {"all": every, "5pct": every // 20}.get(word) or int(word)
        own = found["labeled"] + (found["holdout"] if "fm-separate" in name else 0)
        assert own == labels, name
        again = found["labeled"] if run.split.labeled_in_unlabeled else 0
        assert sum(found.values()) - found["test"] - again == every, name
    expected = {  # labeled, unlabeled, hold-out, validation
        "l2i-v2-mt-cifar10-250": (250, 44_750, 0, 5_000),  # "|U| = 45,000 - |T|"
        "l2i-v1-pl-v1-separate-cifar100-500": (500, 44_000, 500, 5_000),
        "l2i-v2-fm-separate-cifar100-500": (300, 44_500, 200, 5_000),
        "meta-gradient-cifar10-4000": (4_000, 46_000, 0, 0),
        "weights-uda-cifar10-250": (250, 48_976, 1_024, 0),  # the labeled ones among the unlabeled
        "weights-uda-validation-64-cifar10-250": (250, 49_936, 64, 0),
        "lga-cifar10-4000": (4_000, 41_000, 0, 5_000),
        "l2i-v1-mt-v2-tiny-imagenet-5pct": (5_000, 95_000, 0, 0),
    }
    for name, counts in expected.items():
        cell = PRESETS[name]
        run = resolve(cell.config, images[cell.dataset])
        found = sizes[cell.dataset, run.labels_per_class, run.split]
        assert tuple(found[part] for part in ("labeled", "unlabeled", "holdout", "validation")) == counts, name


def test_presets_are_whole():
    """They survive JSON, and name their data; their nets take their images."""
    seen = set()
    for name, cell in PRESETS.items():
        run = cell.config
        assert from_dict(json.loads(json.dumps(run.as_dict()))).as_dict() == run.as_dict(), name
        assert cell.dataset == run.data
        assert cell.error is None or 0 < cell.error < 100
        assert ("-alone" in name) == (run.method == "none"), name
        if cell.dataset != "imdb":
            seen.add((run.model, run.image_size, cell.dataset))
    for model, size, dataset in seen:
        channels = 1 if dataset == "fashion-mnist" else 3
        with torch.device("meta"):
            net = build_model(model, num_classes=CLASSES[dataset], channels=channels, image_size=size)
            assert net.eval()(torch.zeros(1, channels, size, size)).shape == (1, CLASSES[dataset])


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of .* \(l2i-v2-mt-cifar10-\d+, .*got 'l2i-v2-mt-cifar'"):
        preset("l2i-v2-mt-cifar")


def test_the_list(capsys):
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in PRESETS)
    papers = [line for line in listed.splitlines() if line and line[0] not in " ["]
    assert sorted(papers) == sorted({cell.paper for cell in PRESETS.values()})
    assert cli.main(["presets", "L2I-V2", "cifar-10 ", "2 and 8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Learning to Impute, journal version"
    row = next(line.split() for line in lines if "l2i-v2-mt-cifar10-1000" in line)
    assert row[1:7] == ["Tables", "2", "and", "8", "14.76%", "[1]"]
    assert "[1] Table 8: 15.76%." in lines
    assert cli.main(["presets", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("fastmeta: error: no preset has nothing in its name")
    assert cli.main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(PRESETS)
    row = rows["l2i-v2-mt-cifar10-250"]
    assert row["error"] == 25.97
    assert from_dict(row["config"]).as_dict() == config("l2i-v2-mt-cifar10-250").as_dict()


def test_the_command_line_starts_from_a_preset(monkeypatch, capsys):
    seen: list[tuple[RunConfig, str]] = []
    monkeypatch.setattr(cli, "train_command", lambda run, out: seen.append((run, str(out))) or 0)
    found = {"step": 2, "skipped_steps": 0}
    monkeypatch.setattr(cli, "run_smoke", lambda preset, out: seen.append((preset.config, str(out))) or found)
    name = "weights-uda-neumann-cifar10-4000"
    changes = ["--data", "images", "--seed", "7", "--optimizer.learning-rate", "0.2"]
    assert cli.main(["train", "--preset", name, *changes]) == 0
    figure = "Not All Unlabeled Data Are Equal, Fig. 3: 4.85%."
    assert capsys.readouterr().out == f"{figure} Otherwise here: optimizer.\n"
    expected = preset(name).config
    changed = dataclasses.replace(expected.optimizer, learning_rate=0.2)
    run = dataclasses.replace(expected, data="cifar-10:images", seed=7, optimizer=changed)
    assert seen.pop() == (run, os.path.join("runs", f"{name}-seed-7"))
    for data, read, said in (
        ("cifar-10:images", "cifar-10:images", ""),
        ("huggingface:cifar10", "huggingface:cifar10", ""),
        ("cifar-100:images", "cifar-100:images", " Otherwise here: data."),
        ("digits", "digits", " Otherwise here: data."),
    ):
        assert cli.main(["train", "--preset", name, "--data", data]) == 0
        assert seen.pop()[0].data == read
        assert capsys.readouterr().out == f"{figure}{said}\n"
    assert cli.main(["train", "--preset", name, "--smoke", "--out", "here"]) == 0
    assert seen.pop() == (expected, "here")
    assert capsys.readouterr().out == f"{name}: 2 steps, 0 of them without a finite loss\n"
    found["skipped_steps"] = 1
    assert cli.main(["train", "--preset", name, "--smoke"]) == 1


def test_a_folder_without_the_data_of_the_preset_is_refused(tmp_path, capsys):
    """Not taken for a folder of pictures, nor for another data set that lies there."""
    for content in ("test", "train/cat"):
        (tmp_path / content).mkdir(parents=True)
        out = tmp_path / "out"
        assert cli.main(["train", "--preset", "l2i-v2-mt-cifar10-250", "--data", str(tmp_path), "--out", str(out)]) == 2
        assert "no cifar-10 found; expected data_batch_1" in capsys.readouterr().err
        assert not out.exists()


def test_base_settings_that_are_left_out_are_published_ones():
    """And not those chosen on digits: in the list, in JSON and in the run alike."""
    mixmatch = config("l2i-v2-mm-alone-cifar10-250").as_dict()["base_settings"]
    assert (mixmatch["ramp"], mixmatch["ramp_shape"]) == (16_384 / 2**20, "linear")
    mixed = config("l2i-v2-mixup-alone-cifar10-250").as_dict()["base_settings"]
    assert (mixed["weight"], mixed["ramp"], mixed["statistics"]) == (1.0, 0.0, "separate")
    assert config("weights-remixmatch-alone-cifar10-250").as_dict()["base_settings"]["ramp"] == 16_384 / 2**20


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ("--base-settings", "weight=2.0", "--method-settings", "rate=0.3"),
            {"base_settings": {"weight": 2.0}, "method_settings": {"rate": 0.3}},
        ),
        (("--method", "none"), {"method": "none"}),
        (("--base", "pi-model"), {"base": "pi-model"}),
        (
            ("--base", "fixmatch", "--base-settings", "threshold=0.9"),
            {"base": "fixmatch", "base_settings": {"threshold": 0.9}},
        ),
    ],
)
def test_settings_that_are_given_change_those_of_the_preset(monkeypatch, given, expected):
    """And leave the others; those of another base or method have nothing to do with them."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(cli, "train_command", lambda run, out: seen.append(run) or 0)
    name = "l2i-v2-mt-cifar10-250"
    assert cli.main(["train", "--preset", name, "--data", "cifar-10:images", *given]) == 0
    own = {"base": "mean-teacher", "method": "l2i-published"}
    for part in own:
        expected = {part: own[part], f"{part}_settings": {}, **expected}
        if expected[part] == own[part]:
            expected[f"{part}_settings"] = {**getattr(config(name), f"{part}_settings"), **expected[f"{part}_settings"]}
    assert seen == [dataclasses.replace(config(name), data="cifar-10:images", **expected)]


def test_what_the_command_line_refuses(capsys):
    for arguments, message in {
        ("train", "--split.foreign-classes", "10"): "--split.foreign-classes must lie in [0, 8] for digits",
        ("train", "--split.imbalance", "0.5"): "--split.imbalance must be at least 1",
        ("train", "--smoke"): "--preset must be given with smoke: see fastmeta presets",
        ("train", "--preset", "l2i-v2-mt-cifar10-250", "--smoke", "--data", "digits"): (
            "--data must be left out with smoke, which generates its own, got 'digits'"
        ),
        ("train", "--preset", "l2i"): "--preset must be one of those that fastmeta presets lists",
        ("train", "--preset", "l2i-v2-mt-cifar10-250"): (
            "--data must be where cifar-10 is with preset l2i-v2-mt-cifar10-250, got none: expected data_batch_1"
        ),
    }.items():
        assert cli.main(list(arguments)) == 2
        assert f"fastmeta: error: {message}" in capsys.readouterr().err
