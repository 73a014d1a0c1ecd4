import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.data import DataError, open_images


@pytest.fixture
def write(tmp_path):
    """Writes pictures 0.png to 4.png and a CSV of these lines."""
    for number in range(5):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"{number}.png")

    def write_csv(*lines, encoding="utf-8"):
        (tmp_path / "data.csv").write_text("\n".join(lines) + "\n", encoding=encoding)
        return tmp_path / "data.csv"

    return write_csv


def _open(path):
    return open_images(path, cache=False)


def test_paths_and_labels(write, tmp_path):
    images = _open(write("path,label", "3.png,dog", f"{tmp_path}/1.png, cat ", "./2.png,", "", '"0.png","dog"'))
    assert images.classes == ("cat", "dog")
    assert images.targets.tolist() == [1, 0, -1, 1]
    assert {part: places.tolist() for part, places in images.parts.items()} == {"train": [0, 1, 3], "unlabeled": [2]}
    assert images.get(torch.arange(4))[:, 0, 0, 0].tolist() == [3, 1, 2, 0]
    assert images.describe(2) == str(tmp_path / "2.png")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_what_spreadsheets_write(write, delimiter):
    lines = ["Label,Path,Part", "10,0.png,train", "9,1.png,", "9,2.png,val", "10,3.png,test", "10,4.png,unlabeled"]
    images = _open(write(*(line.replace(",", delimiter) for line in lines), encoding="utf-8-sig"))
    assert images.classes == ("9", "10")
    assert images.targets.tolist() == [1, 0, 0, 1, 1]
    assert {part: places.tolist() for part, places in images.parts.items()} == {
        "train": [0, 1],
        "unlabeled": [4],
        "validation": [2],
        "test": [3],
    }


def test_a_part_without_labels_is_left_out(write):
    with pytest.warns(UserWarning, match="the test part has no labels and is left out"):
        images = _open(write("path,label,part", "0.png,a,train", "1.png,,test"))
    assert list(images.parts) == ["train"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "0.png,a"], "the first line must name the columns path and label, got 'file,label'"),
        (["path,label"], "nothing found, expected a row for each path"),
        (["path,label", "0.png,a", "", "1.png,b", "./0.png,a"], r"/0.png is there twice, in lines 2 and 5"),
        (["path,label", "0.png,a", "x.png,a", "y.png,a"], r"2 of 3 files are missing: .*/x.png, .*/y.png"),
        (
            ["path,label,part", "0.png,a,", "1.png,b,test"],
            r"data.csv: line 3: label 'b' is no class .* one of a",
        ),
        (["path,label,part", "0.png,a,", "1.png,a,dev"], "line 3: part must be one of train, .* got 'dev'"),
        (["path,label,part", "0.png,a,", "1.png,a,test", "2.png,,test"], "line 4: a test image has no label"),
        (["path,label", "0.png,", "1.png,"], "line 2: nothing in the train part has a label"),
    ],
)
def test_what_is_wrong_is_named(write, lines, message):
    with pytest.raises(DataError, match=message):
        _open(write(*lines))


def test_text_of_another_encoding_is_refused(write):
    with pytest.raises(DataError, match=r"data.csv: must be UTF-8 text, got byte 0xe9"):
        _open(write("path,label", "0.png,café", encoding="latin-1"))
