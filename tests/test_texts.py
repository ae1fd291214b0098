import os
import random
import struct

import h5py
import numpy as np
import pytest

from noria.errors import InputError
from noria.tools.texts import Texts, stored_here


def write(path, texts, step=7):
    """As Noria writes: columns side by side, some rows at a time."""
    with h5py.File(path, "w") as file:
        file.attrs["said"] = "an attribute has a heap too"
        for name in ("one", "two"):
            file.create_dataset(name, (len(texts),), h5py.string_dtype())
        for start in range(0, len(texts), step):
            for name in ("one", "two"):
                part = np.empty(len(texts[start : start + step]), object)
                part[:] = texts[start : start + step]
                file[name][start : start + step] = part
    return path


def read(path, rows=slice(None)):
    with h5py.File(path, "r") as file:
        assert stored_here(file["two"])
        return Texts(file["two"], file.id.get_vfd_handle(), path)[rows].tolist()


def test_texts_are_those_that_h5py_reads(tmp_path):
    draw = random.Random(3)
    lengths = [0, 1, 7, 8, 9, 30, 200, 4000, 4080, 4096, 5000, 70_000]
    texts = [bytes(draw.choices(range(1, 256), k=draw.choice(lengths))) for _ in range(150)]
    path = write(tmp_path / "a.h5", texts)
    assert read(path) == texts
    with h5py.File(path) as file:
        for rows in (slice(0, 0), slice(3, 4), slice(140, 500), slice(20, 90)):
            assert read(path, rows) == list(file["two"][rows])


def test_a_column_that_is_stored_in_another_way_is_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("chunked", data=["a", "b"], dtype=h5py.string_dtype(), chunks=(1,))
        file.create_dataset("fixed", data=np.array([b"a", b"b"]))
        assert not stored_here(file["chunked"]) and not stored_here(file["fixed"])


@pytest.mark.parametrize(
    "size", [0, 2**16, 2**40, 2**63, 2**64 - 1], ids=["nothing", "more", "more than the file", "2**63", "2**64 - 1"]
)
@pytest.mark.parametrize("what", ["heap", "object"])
def test_a_heap_that_lies_of_its_size_is_named_and_never_read_for_ever(tmp_path, what, size):
    path = write(tmp_path / "a.h5", [b"first text", b"second text", b"third text"])
    content = bytearray(path.read_bytes())
    at = content.index(b"second text") - 8 if what == "object" else content.rindex(b"GCOL") + 8
    content[at : at + 8] = struct.pack("<Q", size)
    path.write_bytes(content)
    try:
        found = read(path)
    except InputError as error:
        assert "a.h5" in str(error) and "column two" in str(error)
    else:
        assert found == [b"first text", b"second text", b"third text"]


def test_zeros_in_a_heap_are_named(tmp_path):
    path = write(tmp_path / "a.h5", [b"x" * 60] * 200)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"GCOL") + 1024
    content[at : at + 512] = bytes(512)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.h5 is damaged: column two: text \d+ of 60 bytes is not in its heap"):
        read(path)


def test_a_column_beyond_the_end_of_its_file_is_named(tmp_path):
    path = write(tmp_path / "a.h5", [b"x" * 60] * 200)
    with h5py.File(path) as file:
        texts = Texts(file["two"], file.id.get_vfd_handle(), path)
        os.truncate(path, file["two"].id.get_offset() + 100)
        with pytest.raises(InputError, match=r"a\.h5 is damaged: column two: the file ends before byte"):
            texts[:]
