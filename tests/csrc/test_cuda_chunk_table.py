"""csrc/cuda/chunk_table.h alone: which block works on which elements, and where these lie. Host arithmetic, no CUDA."""

import ctypes
import itertools
import math
import random
import shutil
import subprocess
from pathlib import Path

import build_cuda
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).parents[1] / "chunk_table.cpp"
CHUNK, LISTS, ITEM = 4096, 3, 4
pytestmark = pytest.mark.skipif(shutil.which(build_cuda.compiler()) is None, reason="no C++ compiler")


class Table:
    """The header behind ctypes: tensors go in, and for each launch and block comes out what it works on."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        found = self._integers(6)
        self.library.limits(found)
        self.small_entries, self.small_words, self.small_bytes = found[:3]
        self.large_entries, self.large_words, self.large_bytes = found[3:]

    @staticmethod
    def _integers(count, values=()):
        return (ctypes.c_int64 * count)(*values)

    def clear(self):
        self.library.clear()

    def add(self, addresses, sizes, strides, dense=False):
        flat = list(itertools.chain(*strides))
        failed = self.library.add(
            self._integers(LISTS, addresses),
            self._integers(len(sizes), sizes),
            self._integers(len(flat), flat),
            ctypes.c_int64(len(sizes)),
            dense,
        )
        if failed:
            raise OverflowError

    def make(self):
        """Of each launch: size, chunks, chunks before; and how many launches have the small table."""
        small = self._integers(1)
        launches = []
        for number in range(self.library.make(small)):
            found = self._integers(3)
            self.library.table(number, found)
            launches.append(tuple(found))
        return launches, small[0]

    def chunk(self, launch, index):
        """Address, first element, count, dimensions or -1, aligned, kind."""
        found = self._integers(6)
        self.library.chunk(launch, ctypes.c_uint32(index), found)
        return tuple(found)

    def offsets(self, launch, index, element):
        found = self._integers(LISTS)
        self.library.offsets(launch, ctypes.c_uint32(index), ctypes.c_int64(element), found)
        return tuple(found)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("chunk_table") / "chunk_table.so"
    command = [build_cuda.compiler(), "-std=c++20", "-O1", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([*command, f"-I{build_cuda.CSRC}", str(SOURCE), "-o", str(made)], check=True)
    return Table(made)


@pytest.fixture
def table(library):
    library.clear()
    return library


def contiguous(sizes, order=None):
    """Strides of a tensor without gaps, its dimensions from outermost to innermost in ``order``."""
    strides, step = [0] * len(sizes), 1
    for d in reversed(order or range(len(sizes))):
        strides[d] = step
        step *= sizes[d]
    return strides


def flat(table, address, count):
    table.add([address] * LISTS, [count], [[1]] * LISTS)


shapes = st.lists(st.integers(0, 5), max_size=4)


@given(shapes=st.lists(shapes, max_size=6), seed=st.integers(0, 2**32), dense=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_element_once_and_in_its_place(library, shapes, seed, dense):
    """Against all indices one by one: permuted, spaced out and repeated dimensions."""
    library.clear()
    draw = random.Random(seed)
    tensors = {}
    for number, sizes in enumerate(shapes):
        strides = []
        for k in range(LISTS):
            order = draw.sample(range(len(sizes)), len(sizes))
            padded = [size + draw.choice([0, 0, 1]) for size in sizes]
            of_list = contiguous(padded, draw.choice([order, None]))
            # The first list has memory of its own; a list that is only read may repeat a dimension.
            strides.append([0 if k == 1 and draw.random() < 0.2 else s for s in of_list])
        library.add([1024 * (number + 1)] * LISTS, sizes, strides, dense)
        if math.prod(sizes):
            tensors[1024 * (number + 1)] = sizes, strides
    launches, _ = library.make()
    seen = {address: [] for address in tensors}
    for launch, (_, chunks, _) in enumerate(launches):
        for index in range(chunks):
            address, first, count, dimensions, _, kind = library.chunk(launch, index)
            assert kind == 7
            assert (dimensions == -1) == (library.chunk(launch, index)[4] == 1), "flat here is aligned too"
            seen[address] += [library.offsets(launch, index, first + i) for i in range(count)]
    for address, (sizes, strides) in tensors.items():
        places = [
            tuple(sum(i * s for i, s in zip(index, of_list, strict=True)) for of_list in strides)
            for index in itertools.product(*map(range, sizes))
        ]
        places.sort(key=lambda place: place[0])  # in the order of the first list
        expected = [(*place[:2], rank) for rank, place in enumerate(places)] if dense else places
        assert seen[address] == expected


def test_dimensions_merge_wherever_the_tensors_agree(table):
    def dimensions(*strides, sizes=(6, 5, 4, 3)):
        table.clear()
        table.add([0] * LISTS, sizes, strides)
        table.make()
        return table.chunk(0, 0)[3]

    plain, channels_last = contiguous((6, 5, 4, 3)), contiguous((6, 5, 4, 3), (0, 2, 3, 1))
    assert dimensions(plain, plain, plain) == -1
    assert dimensions(channels_last, channels_last, channels_last) == -1
    assert dimensions(channels_last, plain, channels_last) == 3  # N, H W, C
    assert dimensions([2 * s for s in plain], plain, plain) == 1
    assert dimensions(plain, [0] * 4, plain) == 1
    assert dimensions(plain, [0, 12, 3, 1], plain) == 2
    assert dimensions([7, 1, 9, 9], [7, 1, 5, 5], [7, 1, 0, 0], sizes=(4, 7, 1, 1)) == -1


def test_alignment_counts_in_every_list(table):
    for addresses in ([16, 32, 4096], [16, 32, 4100], [8, 32, 4096], [16, 34, 4096]):
        table.clear()
        table.add(addresses, [100], [[1]] * LISTS)
        table.make()
        assert table.chunk(0, 0)[4] == all(address % 16 == 0 for address in addresses)


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 5, 2**35])
def test_sizes_around_a_chunk_and_beyond_32_bits(table, count):
    for address in (16, 32, 48):
        flat(table, address, count)
    launches, small = table.make()
    each = -(-count // CHUNK)
    assert launches == [(3, 3 * each, 0)]
    assert small == 1
    for tensor, address in enumerate((16, 32, 48)):
        assert table.chunk(0, tensor * each)[:3] == (address, 0, min(count, CHUNK))
        last = (each - 1) * CHUNK
        assert table.chunk(0, tensor * each + each - 1)[:3] == (address, last, count - last)


def test_places_beyond_32_bits(table):
    """The quotients are exact up to the largest tensor there can be: 2^43 elements."""
    draw = random.Random(0)
    for _ in range(300):
        bits = draw.randint(2, 41)
        inner = draw.choice([2**bits, 2**bits - 1, 2**bits + 1, draw.randint(2, 2**bits)])
        outer = (2**43 - CHUNK) // inner
        table.clear()
        table.add([0] * LISTS, [outer, inner], [[inner, 1], [2 * inner, 1], [inner, 2]])
        ((_, chunks, _),), _ = table.make()
        for row, column in [(0, inner - 1), (1, 0), (outer - 1, 0), (outer - 1, inner - 1), (outer // 2, inner // 2)]:
            element = row * inner + column
            index = min(element // CHUNK, chunks - 1)
            expected = element, row * 2 * inner + column, row * inner + 2 * column
            assert table.offsets(0, index, element) == expected


def test_launches_of_more_than_2_31_chunks(table):
    for address in (16, 32, 48):
        flat(table, address, 2**42)  # 2^30 chunks: one fits beside another, not a third
    flat(table, 64, 1)
    with pytest.raises(OverflowError):
        flat(table, 80, 2**43)
    launches, _ = table.make()
    assert [(size, chunks) for size, chunks, _ in launches] == [(1, 2**30), (1, 2**30), (2, 2**30 + 1)]
    assert [before for _, _, before in launches] == [0, 2**30, 2**31]
    assert table.chunk(2, 2**30)[:3] == (64, 0, 1)


def test_tensors_that_do_not_fit_one_table(table):
    assert table.small_bytes <= 8 * 1024
    assert table.large_bytes <= 32 * 1024 - 256  # beside the other parameters of a kernel
    for count in (table.small_entries, table.small_entries + 1, table.large_entries, 2 * table.large_entries + 1):
        table.clear()
        for address in range(count):
            flat(table, address, 1 + address % 3 * CHUNK)
        launches, small = table.make()
        assert small == (count <= table.small_entries)
        sizes = [table.large_entries] * (count // table.large_entries) + [count % table.large_entries]
        assert [size for size, _, _ in launches] == [size for size in sizes if size]
        before, address = 0, 0
        for launch, (_, chunks, said) in enumerate(launches):
            assert said == before
            before += chunks
            found = [table.chunk(launch, index)[:2] for index in range(chunks)]
            expected = []
            while len(expected) < len(found):
                expected += [(address, chunk * CHUNK) for chunk in range(1 + address % 3)]
                address += 1
            assert found == expected
        assert address == count


def test_layouts_that_do_not_fit_one_table(table):
    sizes, apart = [3, 4, 5], [200, 40, 7]
    words = 1 + 4 * 3
    each, count = table.large_words // words, 2 * (table.large_words // words) + 1
    for address in range(count):
        table.add([address] * LISTS, sizes, [apart, contiguous(sizes), [s + address for s in apart]])
    launches, small = table.make()
    assert [size for size, _, _ in launches] == [each, each, 1]
    assert small == 0
    for launch, index in ((0, each - 1), (1, 0), (2, 0)):
        address = table.chunk(launch, index)[0]
        assert address == launch * each + index
        assert table.offsets(launch, index, 59) == (548, 59, 548 + 9 * address)


def test_most_dimensions_a_tensor_can_have(table):
    """39 dimensions of size 2, none of which merge."""
    strides = [3**d for d in range(39)]
    table.add([0] * LISTS, [2] * 39, [strides] * LISTS)
    launches, small = table.make()
    assert (len(launches), small) == (1, 1)
    element = 2**39 - 1
    assert table.offsets(0, element // CHUNK, element) == (sum(strides),) * LISTS


def test_nothing_to_do(table):
    assert table.make() == ([], 0)
    table.add([16] * LISTS, [3, 0, 2], [[0, 2, 1]] * LISTS)
    assert table.make() == ([], 0)
    table.add([16] * LISTS, [], [[]] * LISTS)
    assert table.make() == ([(1, 1, 0)], 1)
    assert table.chunk(0, 0)[:4] == (16, 0, 1, -1)
