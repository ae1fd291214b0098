"""Tensors of safetensors files past the page cache and through it: their numbers, their memory, and what is read ahead."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from noria.checkpoint import tensor_files
from noria.checkpoint.tensor_files import Reader, ahead, list_tensors
from noria.errors import InputError
from noria.tools import direct


@pytest.fixture(params=["direct", "refused", "small"])
def way(request, monkeypatch):
    """How tensors are read: past the cache, by a file system that has no such way, or as small ones are."""
    monkeypatch.setattr(tensor_files, "DIRECT_NBYTES", 1 if request.param != "small" else 1 << 30)
    if request.param == "refused":
        monkeypatch.setattr(direct, "_open_direct", lambda descriptor, writable: None)


def written(path):
    """Tensors of many sizes and dtypes, the last of which ends in the middle of a page."""
    random = np.random.default_rng(0)
    dtypes = [torch.bfloat16, torch.float32, torch.int8, torch.int64]
    sizes = random.integers(1, 30_000, 24).tolist()
    tensors = {
        f"t{number}": torch.from_numpy(random.integers(-90, 90, size)).to(dtypes[number % 4]).view(size, 1)
        for number, size in enumerate(sizes)
    }
    save_file(tensors, path)
    return list_tensors(path)


def test_all_tensors_at_once_have_the_numbers_of_the_file(tmp_path, way):
    tensors, reader = written(tmp_path / "a.safetensors"), Reader()
    found = {name: reader.whole(tensor) for name, tensor in tensors.items()}  # none in memory that another has
    right = load_file(tmp_path / "a.safetensors")
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)


def test_chunks_are_the_numbers_in_order(tmp_path, way, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK_NBYTES", 5000)
    tensors, right = written(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        found = list(Reader().chunks(tensor))
        assert torch.equal(torch.cat(found), right[name].flatten())
        assert all(chunk.nbytes <= 5000 for chunk in found)


@pytest.mark.parametrize("shift", range(4))
def test_numbers_that_lie_at_an_odd_place_are_read(tmp_path, way, shift):
    right = torch.arange(5000, dtype=torch.float32)
    header = json.dumps({"a": {"dtype": "F32", "shape": [5000], "data_offsets": [0, 20_000]}}) + " " * shift
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + right.numpy().tobytes())
    assert torch.equal(Reader().whole(list_tensors(path)["a"]), right)


def test_a_file_that_became_shorter_is_told(tmp_path, way):
    tensors = written(tmp_path / "a.safetensors")
    last = max(tensors.values(), key=lambda tensor: tensor.offset)
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(last.offset + 1)
    with pytest.raises(InputError, match=r"a\.safetensors .*truncated"):
        Reader().whole(last)


def test_memory_is_used_again_once_nothing_views_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "DIRECT_NBYTES", 1)
    reader, tensor = Reader(), next(iter(written(tmp_path / "a.safetensors").values()))

    def place(found):
        return found.untyped_storage().data_ptr()

    first = reader.whole(tensor)
    view = first.view(-1).view(torch.uint8)[3:].numpy().data  # what a writer holds
    begin = place(first)
    del first
    other = reader.whole(tensor)
    assert place(other) != begin
    del view
    assert place(reader.whole(tensor)) == begin


@pytest.mark.parametrize(("nbytes", "most"), [(1 << 40, 2), (4 << 20, 4), (0, 8)])
def test_items_are_begun_before_they_are_wanted_as_many_as_memory_is_meant_for(nbytes, most):
    begun = []
    found = ahead(lambda item: begun.append(item) or -item, range(20), nbytes)
    for item in range(20):
        assert next(found) == -item
        wanted, until = min(item + 1 + most, 20), time.monotonic() + 5
        while len(begun) < wanted and time.monotonic() < until:
            time.sleep(0.001)
        assert sorted(begun) == [*range(wanted)]


def test_an_error_of_an_item_comes_where_the_item_would():
    found = ahead(lambda item: 1 // item, [1, 1, 0, 1], 1)
    assert [next(found), next(found)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
