"""Texts in attributes are looked at before they are read, and no limit of the whole process is lowered for it."""

import resource
import struct

import h5py
import numpy as np
import pytest

from hostile import patch
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.errors import InputError
from noria.tools.container import attribute
from noria.tools.headers import text_nbytes
from tiny_models import LLAMA, state, write_directory


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.h5"


def write(path, libver="v108", **attributes):
    with h5py.File(path, "w", libver=(libver, "latest")) as file:
        file.attrs.update(attributes)


def length_of(path, name):
    with h5py.File(path) as file, path.open("rb") as opened:
        return text_nbytes(opened.fileno(), h5py.h5o.get_info(file.id).addr, name)


@pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "latest"])
@pytest.mark.parametrize("count", [1, 5, 8, 9, 40, 400])
def test_the_length_of_a_text_is_that_of_its_bytes(path, libver, count):
    texts = {f"name {number}": "ü" * number for number in range(1, count + 1)}
    write(path, libver, **texts)
    assert {name: length_of(path, name) for name in texts} == {name: len(text.encode()) for name, text in texts.items()}


def test_the_length_is_found_in_a_header_that_goes_on_elsewhere(path):
    write(path, first="a")
    for number in range(6):  # each opening adds to a header that was full
        with h5py.File(path, "r+", libver=("v108", "v108")) as file:
            file.attrs[f"later {number}"] = "b" * number
            file.create_group(f"group {number}")
    assert [length_of(path, f"later {number}") for number in range(6)] == list(range(6))


def test_the_length_of_a_value_that_was_replaced_is_not_less_than_that_of_the_new_one(path):
    write(path, **{f"name {number}": "a" for number in range(7)})
    for length in (5000, 3):
        with h5py.File(path, "r+") as file:
            file.attrs["name 3"] = "b" * length
        assert length <= length_of(path, "name 3") <= 5000


def test_nothing_is_said_of_what_is_no_attribute(path):
    write(path, name="text")
    assert length_of(path, "other") is None
    with path.open("rb") as opened:
        assert text_nbytes(opened.fileno(), 10**9, "name") is None and text_nbytes(opened.fileno(), 3, "name") is None


def test_a_text_that_says_it_is_longer_than_its_file_is_refused(path):
    write(path, config="x" * 300)
    patch(path, "/", struct.pack("<I", 300), struct.pack("<I", 2**32 - 2))
    with h5py.File(path) as file, pytest.raises(InputError, match="'config' of '/' says it has 4294967294 bytes"):
        attribute(file, "config", path)


def test_a_value_that_may_hold_texts_of_its_own_is_refused(path):
    write(path)
    with h5py.File(path, "r+") as file:
        file.attrs["config"] = np.array(("text",), [("text", h5py.string_dtype())])[()]
        with pytest.raises(InputError, match="needs a number or a text as its attribute 'config'"):
            attribute(file, "config", path)


def test_a_checkpoint_is_opened_without_touching_the_limits_of_the_process(path, monkeypatch):
    convert(write_directory(path.parent / "hf", LLAMA, state(LLAMA)), path)
    touched = []
    monkeypatch.setattr(resource, "setrlimit", lambda *arguments: touched.append(arguments))
    with open_checkpoint(path):
        pass
    assert not touched, "another thread's memory would have failed meanwhile"
