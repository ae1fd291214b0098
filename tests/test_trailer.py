import random

import h5py
import numpy as np
import pytest

from noria.tools.trailer import agrees, append_trailer, with_trailer


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as opened:
        opened["numbers"] = np.arange(5000)
        opened.attrs["said"] = "text " * 50
    return path


def test_hdf5_reads_a_file_with_a_checksum_behind_it(file):
    append_trailer(file)
    assert agrees(file) is True
    with h5py.File(file) as opened:
        assert opened["numbers"][:].tolist() == list(range(5000)) and opened.attrs["said"] == "text " * 50


def test_what_is_built_in_memory_has_the_same_checksum(file, tmp_path):
    content = file.read_bytes()
    append_trailer(file)
    assert with_trailer(content) == file.read_bytes()


def test_a_file_without_a_checksum_has_none(file, tmp_path):
    assert agrees(file) is None
    for content in (b"", b"NoriaSum", b"x" * 100):
        (tmp_path / "other").write_bytes(content)
        assert agrees(tmp_path / "other") is None


def test_every_changed_byte_is_found_but_for_those_in_holes(file):
    with h5py.File(file) as opened:
        begin = opened["numbers"].id.get_offset()
    holes = [(begin + 8000, begin + 8100), (begin, begin + 4000), (begin + 4000, begin + 8000)]
    append_trailer(file, holes)
    content, draw = file.read_bytes(), random.Random(1)
    for place in [0, begin - 1, begin, begin + 8099, begin + 8100, *(draw.randrange(len(content)) for _ in range(200))]:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        found = agrees(file)
        if begin <= place < begin + 8100:
            assert found is True
        elif place < len(content) - 40:
            assert found is False, place
        else:
            assert not found, place


@pytest.mark.parametrize("cut", [1, 39, 40, 41, 5000])
def test_a_file_that_was_cut_short_or_has_more_does_not_agree(file, cut):
    append_trailer(file)
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    assert not agrees(file)
    file.write_bytes(content[:500] + b"x" * cut + content[500:])
    assert agrees(file) is False


def test_a_file_that_hdf5_changed_has_no_checksum(file):
    append_trailer(file)
    with h5py.File(file, "r+") as opened:
        opened.attrs["said"] = "other"
    assert not agrees(file)
