"""The kernels of a cache in fewer bits in Triton's interpreter, which runs them on the CPU, to the bits of the plain way.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6). Where
there is a GPU, gpu/test_encoded_cache.py runs what is compiled.
"""

import importlib
import importlib.util

import numpy as np
import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

with pytest.MonkeyPatch.context() as patch:  # what is imported now is interpreted
    patch.setenv("TRITON_INTERPRET", "1")
    kernels = importlib.import_module("noria.kernels.rounded")

from noria.arrays import ENCODINGS, Array, encoded
from noria.engine.parameters import FIELD_DTYPES
from noria.engine.rounding import RoundedArray

KINDS = sorted(ENCODINGS)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)


def opened(kind, heads, size, of):
    array = encoded((Array("key", (heads, size)), Array("value", (heads, size))), ENCODINGS[kind])[of == "value"]
    fields = {
        name: torch.full((96, *one.row), 3, dtype=FIELD_DTYPES[one.computed("")]) for name, one in array.fields.items()
    }
    return RoundedArray(array, fields)


def numbers(heads, size, dtype):
    new = (
        torch.randn(21, heads, size, generator=torch.Generator().manual_seed(size))
        * torch.logspace(-6, 4, 21)[:, None, None]
    )
    new[2], new[3, 0], new[4, 0] = 0, new[3, 0].abs(), -new[4, 0].abs()
    new[5] = torch.linspace(-8, 7, size).round()  # steps that are as near to two codes
    return new.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["key", "value"])
@pytest.mark.parametrize(
    ("heads", "size", "dtype"),
    [(2, 128, torch.float32), (3, 80, torch.float16), (1, 5, torch.float32), (1, 576, torch.float16)],
)
def test_rows_are_rounded_and_pages_decoded_to_the_bits_of_the_plain_way(kind, of, heads, size, dtype):
    plain, other = opened(kind, heads, size, of), opened(kind, heads, size, of)
    new, places = numbers(heads, size, dtype), torch.randperm(96, generator=torch.Generator().manual_seed(1))[:21]
    plain.write(places, new)
    kernels.write(other.array.encoding, places, (other.fields, other.array.group, new))
    for name, one in plain.fields.items():
        assert torch.equal(other.fields[name].float(), one.float()), name
    pages, found = torch.tensor([4, 0, 5, 1]), [torch.zeros(64, heads, size, dtype=dtype) for _ in range(2)]
    plain.decode(pages, found[0])
    kernels.decode(other.array.encoding, plain.fields, other.array.group, pages, found[1])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_rounded_by_one_launch_to_the_bits_of_the_plain_way(kind, monkeypatch):
    launched = []
    monkeypatch.setattr(kernels, "round_rows", Counting(kernels.round_rows, launched))
    new = numbers(2, 80, torch.float16), numbers(2, 128, torch.float16)
    both = [[opened(kind, 2, 80, "key"), opened(kind, 2, 128, "value")] for _ in range(2)]
    places = torch.randperm(96, generator=torch.Generator().manual_seed(1))[:21]
    for its, rows in zip(both[0], new, strict=True):
        its.write(places, rows)
    given = ((its.fields, its.array.group, rows) for its, rows in zip(both[1], new, strict=True))
    kernels.write(ENCODINGS[kind], places, *given)
    for one, other in zip(*both, strict=True):
        assert all(torch.equal(one.fields[name].float(), other.fields[name].float()) for name in one.fields)
    assert len(launched) == 1


class Counting:
    """A kernel, and a list to which each launch adds its grid."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_none_makes_its_own_group_none_and_no_other(kind, wrong):
    its, new = opened(kind, 2, 128, "key"), numbers(2, 128, torch.float32)
    new[1, 0, 5] = wrong
    kernels.write(its.array.encoding, torch.arange(21), (its.fields, its.array.group, new))
    found = torch.zeros(32, 2, 128)
    kernels.decode(its.array.encoding, its.fields, its.array.group, torch.tensor([0, 1]), found)
    sick = ~torch.isfinite(found[:21])
    assert sick[1, 0, :64].any() and sick.sum() == sick[1, 0, :64].sum()
