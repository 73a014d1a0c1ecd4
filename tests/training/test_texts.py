"""Reviews as IMDb has them: tokens, replaced words against the paper's formula, and UDA with a method on a BERT."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmeta.data import DataError, KeyedRandom, open_images
from fastmeta.data.generated import WRITERS
from fastmeta.data.readers.optional import MissingPackage
from fastmeta.data.text import ReplacedWords, Texts, tokenize, trained_tokenizer
from fastmeta.models.bert import Bert
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
from fastmeta.training.predict import require_finished
from fastmeta.training.recipes import METHODS
from fastmeta.training.reports.run_folder import read_run
from fastmeta.training.train import train


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imdb")
    WRITERS["imdb"](folder)
    return folder


def test_words_that_say_little_are_replaced() -> None:
    a, b, c, d = 4, 5, 6, 7  # after four special tokens
    texts = torch.tensor([[2, a, b, a, 3, 0], [2, a, c, c, 3, 0], [2, a, d, 3, 0, 0], [2, a, b, c, 3, 0]])
    view = ReplacedWords.of(texts, 8, share=0.6)
    idf = {a: torch.tensor(4 / 4).log(), b: torch.tensor(4 / 2).log(), c: torch.tensor(4 / 2).log()}
    idf[d] = torch.tensor(4.0).log()
    assert torch.allclose(view.idf[4:], torch.stack([idf[word] for word in (a, b, c, d)]))
    # S(w) = freq(w) IDF(w); what replaces a word has a probability proportional to max S - S(w)
    score = torch.tensor([5.0, 2, 3, 1]) * view.idf[4:]
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
    again = view(rows[:9], KeyedRandom(7, "unlabeled", "second", torch.arange(9)))
    assert again.equal(seen[:9])
    even = view(torch.tensor([[2, a, 3]]).repeat(1000, 1), KeyedRandom(7, "x", "y", torch.arange(1000)))
    assert 0 < int((even[:, 1] != a).sum()) < 1000


def test_words_become_tokens() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = trained_tokenizer(["A good film, a film!", "a GOOD actor", "no word twice here"], 100)
    assert [tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert tokenizer.encode("a good film").tokens == ["a", "good", "film"]
    assert tokenizer.encode("Filmgoof").tokens == ["film", "##g", "##o", "##o", "##f"]
    assert tokenizer.encode("xyz").tokens == ["[UNK]"]
    rows = tokenize(tokenizer, ["a film", "a good film a good"], 5)
    film, a, good = (tokenizer.token_to_id(word) for word in ("film", "a", "good"))
    assert rows.tolist() == [[2, a, film, 3, 0], [2, film, a, good, 3]]


def test_reviews_are_read_as_they_lie(reviews: Path) -> None:
    pytest.importorskip("tokenizers")
    images = open_images(f"imdb:{reviews}", image_size=16)
    assert isinstance(images, Texts)
    assert images.image_shape == (16,)
    assert images.classes == ("neg", "pos")
    assert {part: len(places) for part, places in images.parts.items()} == {"train": 60, "unlabeled": 240, "test": 120}
    for place in (0, 59, 60, 179, 180, 419):
        name = images.describe(place)
        assert (
            int(images.targets[place])
            == {"/neg/": 0, "/pos/": 1, "/unsup/": -1}[name[name.index("/") : -len(Path(name).name)]]
        )
    tokens = images.get(torch.arange(420))
    assert (tokens[:, 0] == 2).all()
    last = (tokens != 0).sum(dim=1) - 1
    assert (tokens.gather(1, last.unsqueeze(1)) == 3).all()
    whole = open_images(reviews / "aclImdb", image_size=64)
    assert int((whole.get(torch.tensor([0])) != 0).sum()) > 16
    ends = whole.get(torch.tensor([0]))[0]
    ends = ends[ends != 0]
    assert tokens[0, 1:].equal(ends[-15:]), "the last tokens of a longer one"
    assert len({open_images(reviews, image_size=16).fingerprint for _ in range(4)} | {images.fingerprint}) == 1
    with pytest.raises(DataError, match=r"no imdb found, expected train/pos/\*.txt"):
        open_images(f"imdb:{reviews / 'aclImdb' / 'test'}")
    with pytest.raises(ValueError, match="at least 3 tokens"):
        open_images(reviews, image_size=2)


def test_missing_packages_are_named(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackage, match="texts are read with tokenizers: pip install tokenizers"):
        open_images(reviews)
    with pytest.raises(UnknownModel, match="model bert-tiny needs the package transformers"):
        Bert("bert-tiny", 2, vocabulary=100, length=16)


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
    with pytest.raises(ValueError, match="must be a run on images, got one on texts"):
        require_finished(read_run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "mixmatch"}, "base must be none that mixes or moves pixels for texts, got 'mixmatch'"),
        ({"base": "vat"}, "base must be none that mixes or moves pixels for texts, got 'vat'"),
        ({"augmentation": AugmentationConfig(flip=True)}, "augmentation must be left out for texts"),
        ({"model": "conv-net"}, "model must be one of auto, bert-tiny, .* for texts, got 'conv-net'"),
    ],
)
def test_what_texts_cannot_have_is_refused(settings: dict, message: str) -> None:
    parts = {"train": torch.arange(8)}
    texts = Texts("eight", torch.randint(4, 9, (8, 6)), 9, torch.arange(8) % 2, ("a", "b"), parts, [""] * 8)
    with pytest.raises(ValueError, match=message):
        build(RunConfig(**{"data": "eight", "base": "uda", "labels_per_class": 2, **settings}), texts)
