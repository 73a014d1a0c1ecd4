"""Reviews as IMDb has them: tokens, replaced words against the paper's formula, and UDA with a method on a BERT."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmeta.cli import main
from fastmeta.data import DataError, KeyedRandom, open_images
from fastmeta.data.generated import WRITERS
from fastmeta.data.readers.optional import MissingPackage
from fastmeta.data.text import ReplacedWords, Texts
from fastmeta.models.bert import build_text_model
from fastmeta.models.libraries import UnknownModel
from fastmeta.training import RunConfig, build
from fastmeta.training.build import load_images
from fastmeta.training.config import (
    AugmentationConfig,
    EvaluationConfig,
    MachineConfig,
    OptimizerConfig,
    SplitConfig,
)
from fastmeta.training.data_to_predict import open_for_prediction
from fastmeta.training.predict import predict, summary_of
from fastmeta.training.recipes import METHODS
from fastmeta.training.reports.report import write_report
from fastmeta.training.reports.run_folder import read_run
from fastmeta.training.train import train


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imdb")
    WRITERS["imdb"](folder)
    return folder


def test_words_that_say_little_are_replaced() -> None:
    a, b, c, d = 4, 5, 6, 7  # after four special tokens
    # Tokens 8 and 9 are in no text, and never drawn.
    texts = torch.tensor([[2, a, b, a, 3, 0], [2, a, c, c, 3, 0], [2, a, d, 3, 0, 0], [2, a, b, c, 3, 0]])
    special = torch.arange(10) < 4
    view = ReplacedWords.of(texts, special, share=0.6)
    idf = {a: torch.tensor(4 / 4).log(), b: torch.tensor(4 / 2).log(), c: torch.tensor(4 / 2).log()}
    idf[d] = torch.tensor(4.0).log()
    assert torch.allclose(view.idf[4:8], torch.stack([idf[word] for word in (a, b, c, d)]))
    # S(w) = freq(w) IDF(w); what replaces a word has a probability proportional to max S - S(w)
    score = torch.tensor([5.0, 2, 3, 1]) * view.idf[4:8]
    chances = (score.max() - score) / (score.max() - score).sum()
    rows = texts[:1].repeat(20_000, 1)
    seen = view(rows, KeyedRandom(7, "unlabeled", "second", torch.arange(len(rows))))
    assert seen[:, [0, 4, 5]].equal(rows[:, [0, 4, 5]]), "special tokens stay"
    # In the first text a (twice) has TF-IDF 0 and b has (1/3) log 2, the largest: it has never to go.
    assert (seen[:, 2] == b).all()
    least = idf[b] / 3
    chance = min(0.6 * float(least / (2 * least / 3)), 1.0)  # Z is the mean over a, b, a
    for place in (1, 3):
        share = torch.stack([(seen[:, place] == word).float().mean() for word in (a, b, c, d)])
        expected = chance * chances + torch.tensor([1 - chance, 0, 0, 0])
        assert (share - expected).abs().max() < 0.02
    assert int(seen.max()) <= d
    again = view(rows[:9], KeyedRandom(7, "unlabeled", "second", torch.arange(9)))
    assert again.equal(seen[:9])
    even = view(torch.tensor([[2, a, 3]]).repeat(1000, 1), KeyedRandom(7, "x", "y", torch.arange(1000)))
    assert 0 < int((even[:, 1] != a).sum()) < 1000


def test_missing_packages_are_named(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackage, match="texts are read with tokenizers: pip install tokenizers"):
        open_images(reviews)
    with pytest.raises(UnknownModel, match="model bert-tiny needs the package transformers"):
        build_text_model("bert-tiny", 2, vocabulary=100, length=16)


def test_every_method_refines_labels_of_texts(reviews: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    config = RunConfig(
        data=str(reviews),
        base="uda",
        base_settings={"threshold": 0.0},
        labels_per_class=2,
        image_size=8,
        steps=2,
        labeled_batch=4,
        unlabeled_batch=4,
        split=SplitConfig(holdout_per_class=2),
    )
    images = load_images(config)
    for method in METHODS:
        small = {"interval": 1} if "interval" in METHODS[method].settings else {}
        trainer = build(replace(config, method=method, method_settings=small), images).trainer
        for _ in range(2):
            trainer.train_step()
        assert trainer.skipped.tolist() == [0, 0], method


@pytest.mark.parametrize("method", ["none", "l2i"])
def test_uda_learns_reviews(reviews: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    config = RunConfig(
        data=str(reviews),
        base="uda",
        method=method,
        labels_per_class=10,
        image_size=32,
        steps=40,
        labeled_batch=8,
        unlabeled_batch=24,
        optimizer=OptimizerConfig(name="adam"),
        evaluation=EvaluationConfig(every=40),
        machine=MachineConfig(threads=1),
    )
    results = train(config, tmp_path / "run")
    assert results["skipped_steps"] == 0
    assert results["test_error"] < 0.25
    if method == "l2i":
        _predict_as_the_run(tmp_path / "run", reviews / "aclImdb", results["test_error"])


def _predict_as_the_run(folder: Path, reviews: Path, error: float) -> None:
    run = read_run(folder)
    out = folder / "predictions.csv"
    predicted = predict(run, open_for_prediction([str(reviews)], run), out)
    assert predicted.images == 420
    assert [(part.part, part.images) for part in predicted.parts] == [("train", 60), ("test", 120)]
    assert predicted.parts[1].errors == round(120 * error)
    assert predicted.known == 280, "those without a label, and those that lent theirs to nobody"
    other = folder / "other"
    WRITERS["imdb"](other)  # the same names elsewhere
    assert predict(run, open_for_prediction([str(other)], run), out).known == 0
    unsup = predict(run, open_for_prediction([str(reviews / "train" / "unsup")], run), out)
    assert (unsup.images, unsup.known) == (240, 240)
    assert "120 texts with a label" in summary_of(predicted, run)
    # The same texts as files in folders that are named as the classes.
    files = predict(run, open_for_prediction([str(reviews / "test")], run), out)
    assert [(part.part, part.images, part.errors) for part in files.parts] == [("all", 120, predicted.parts[1].errors)]
    one = next((reviews / "test" / "pos").glob("0_*.txt"))
    predict(run, open_for_prediction([str(one)], run), out)
    assert out.read_text().splitlines()[1].startswith(f"{one},")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no texts found"):
        open_for_prediction([str(folder / "empty")], run)
    with pytest.raises(DataError, match=r"config.json: no texts found, expected .txt files"):
        open_for_prediction([str(one), str(folder / "config.json")], run)
    table = folder / "new.csv"
    for lines in ("text\ngreat film\nawful\n", "text,label,part\ngreat film,,\nawful,neg,test\n"):
        table.write_text(lines)
        found = predict(run, open_for_prediction([str(table)], run), out)
        assert found.images == 2
        assert [part.part for part in found.parts] == (["test"] if "neg" in lines else [])
    with pytest.raises(DataError, match="no-such: no such file or folder"):
        open_for_prediction([str(one), "no-such"], run)
    with pytest.raises(DataError, match=r"must be texts, as those of .* got images"):
        open_for_prediction(["digits"], run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "mixmatch"}, "base must be none that mixes or moves pixels for texts, got 'mixmatch'"),
        ({"base": "vat"}, "base must be none that mixes or moves pixels for texts, got 'vat'"),
        ({"augmentation": AugmentationConfig(flip=True)}, "augmentation must be left out for texts"),
        ({"model": "conv-net"}, "model must be one of auto, bert-tiny, .* for texts, got 'conv-net'"),
        ({"views": "pictures"}, "views must be left out for texts"),
        ({"split": SplitConfig(foreign_classes=1)}, "split.foreign_classes must be left out for texts"),
    ],
)
def test_what_texts_cannot_have_is_refused(settings: dict, message: str) -> None:
    pytest.importorskip("tokenizers")
    parts = {"train": torch.arange(8)}
    words = ["a b c", "b c d"] * 4
    texts = Texts("eight", words, torch.arange(8) % 2, ("a", "b"), parts, [""] * 8, length=6)
    with pytest.raises(ValueError, match=message):
        build(RunConfig(**{"data": "eight", "base": "uda", "labels_per_class": 2, **settings}), texts)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as transformers saves it, with a vocabulary of another order than ours, and tokens that no text has."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["film", "great", "awful", "the", "a", "of", "story", "actor", "boring"]
    tokens = ["[PAD]", *(f"[unused{k}]" for k in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "##s"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    settings = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    torch.manual_seed(3)
    transformers.BertModel(settings).save_pretrained(folder)
    return folder


def test_a_pretrained_net_brings_its_tokenizer(reviews: Path, pretrained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = RunConfig(
        data=str(reviews),
        base="uda",
        model=str(pretrained),
        labels_per_class=4,
        image_size=12,
        steps=2,
        labeled_batch=4,
        unlabeled_batch=4,
        optimizer=OptimizerConfig(name="adam"),
        machine=MachineConfig(threads=1),
    )
    images = load_images(config)
    assert isinstance(images, Texts)
    built = build(config, images)
    assert built.config.optimizer.learning_rate == 2e-5
    own = transformers.AutoModel.from_pretrained(pretrained).eval()
    assert built.trainer.model.body.embeddings.word_embeddings.weight.equal(own.embeddings.word_embeddings.weight)
    tokens = images.get(torch.arange(6))
    assert (tokens[:, 0] == 7).all(), "[CLS] of this vocabulary"
    hidden = own(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    mean = torch.stack([row[one != 0].mean(dim=0) for row, one in zip(hidden, tokens, strict=True)])
    assert torch.allclose(built.trainer.model.eval()(tokens), built.trainer.model.fc(mean), atol=1e-5)
    strong = built.trainer.batches(0).second
    assert strong is not None
    words = strong[~images.tokenizer.special[strong]]
    assert int(images.tokenizer.special.sum()) == 5
    assert int(words.min()) >= 10, "tokens that no text has are not drawn"
    results = train(config, tmp_path / "run")
    run = read_run(tmp_path / "run")
    predicted = predict(run, open_for_prediction([str(reviews)], run), tmp_path / "predictions.csv")
    assert predicted.parts[-1].errors == round(120 * results["test_error"])
    going_on = build(
        replace(config, model=str(tmp_path / "run")), load_images(replace(config, model=str(tmp_path / "run")))
    )
    left = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(value.equal(left[name]) for name, value in going_on.trainer.model.state_dict().items())


def test_what_a_pretrained_net_cannot_take_is_refused(reviews: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size must be at most 24 tokens with model .* got 25"):
        build_text_model(str(pretrained), 2, vocabulary=20, length=25)
    with pytest.raises(ValueError, match="has 20 tokens, and its tokenizer 21"):
        build_text_model(str(pretrained), 2, vocabulary=21, length=8)
    with pytest.raises(DataError, match=f"model {tmp_path} has no tokenizer that can be read"):
        load_images(RunConfig(data=str(reviews), base="uda", model=str(tmp_path)))
    with pytest.raises(ValueError, match=f"model {tmp_path} cannot be made"):
        build_text_model(str(tmp_path), 2, vocabulary=20, length=8)


def test_words_of_unlabeled_texts_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "few.csv"
    rows = ["good film,a", "bad film,b", *(f"common word{k % 7} rare{k}," for k in range(60))]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    config = RunConfig(data=str(path), base="uda", image_size=8, unlabeled_batch=60, labeled_batch=2)
    images = load_images(config)
    assert isinstance(images, Texts)
    built = build(config, images)
    batch = built.trainer.batches(0)
    assert batch.second is not None
    common = images.tokenizer(["common"], 3)[0, 1]
    gone = (batch.weak == common) & (batch.second != common)
    assert int(gone.sum()) > 10, "in nearly every text, it says least"


def test_a_comparison_of_texts(tmp_path: Path) -> None:
    """No validation texts, no pixels for a support vector machine, and no picture of a text."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    lines = [
        f"{word} film {k},{label},{part}"
        for part in ("train", "test")
        for k in range(6)
        for label, word in (("no", "awful"), ("yes", "great"))
    ]
    (tmp_path / "mail.csv").write_text("text,label,part\n" + "\n".join(lines) + "\n")
    command = f"compare --data {tmp_path}/mail.csv --base uda --methods l2i --labels-per-class 2 --seeds 1 --steps 2"
    command += f" --workers 1 --image-size 6 --out {tmp_path}/out"
    assert main(command.split()) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["validation_error"] for row in results["table"]] == [None, None]
    assert not results["support_vector_test_error"]
    (run,) = (tmp_path / "out" / "runs" / "uda" / "l2i").glob("seed-0")
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "could not be shown" not in page
    assert ">?<" not in page, "labels of each class are counted in the run's tokens"
