import pytest

from fastmeta.data import ImageDataset, load_digits


@pytest.fixture(scope="session")
def digits() -> ImageDataset:
    return load_digits()
