"""Kernels that decode, in Triton's interpreter, against the encodings' own decode in torch: the same bits.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6). Where
there is a GPU, gpu/test_decode_kernels.py runs the compiled kernels. The interpreter truncates to bfloat16.
"""

import importlib.util
import sys

import numpy as np
import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) >= "2.4.0" or "noria.kernels.items" in sys.modules:
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

import decode_cases
from counts import some
from noria.encodings import _kernels


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", some(decode_cases.CASES), ids=str)
def test_a_kernel_gives_the_bits_of_its_encoding(case, dtype):
    assert decode_cases.other_bits(case, torch.device("cpu"), dtype) == 0


@pytest.mark.parametrize("case", [case for case in decode_cases.CASES if case.encoding == "exponent"], ids=str)
def test_bits_of_bfloat16_are_written_as_they_are(case):
    assert decode_cases.other_bits(case, torch.device("cpu"), torch.bfloat16) == 0


def test_numbers_and_scales_of_every_magnitude_are_decoded():
    for case, fields in decode_cases.extremes():
        dtype = torch.bfloat16 if case.encoding == "exponent" else torch.float32
        assert decode_cases.differences(case, fields, torch.device("cpu"), dtype) == 0, case


def test_fields_of_any_bytes_are_decoded_within_their_memory():
    for case, fields in some(decode_cases.hostile()):
        assert decode_cases.changed_around(case, fields, torch.device("cpu"), torch.float32) == 0, case


@pytest.mark.parametrize("case", some(decode_cases.CASES), ids=str)
def test_pieces_that_a_list_on_the_device_names_are_decoded_and_no_others(case):
    assert decode_cases.listed_bits(case, torch.device("cpu"), torch.float16) == 0


@pytest.mark.parametrize("case", decode_cases.CODED[2:9:3], ids=str)
def test_a_kernel_gives_the_bytes_of_its_encoding(case):
    assert decode_cases.other_bytes(case, torch.device("cpu")) == []


def test_a_kernel_that_gives_other_bytes_is_not_used():
    def wrong(numbers, settings):
        fields = kernel(numbers, settings)
        fields["escapes"][0, 0] ^= 1
        return fields

    kernel = _kernels._encoding_kernel("exponent")
    assert _kernels.encodes_the_same("exponent", kernel, torch.device("cpu"))
    assert not _kernels.encodes_the_same("exponent", wrong, torch.device("cpu"))
