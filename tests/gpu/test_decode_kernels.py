"""Kernels that decode, compiled, against the encodings' own decode in torch on the CPU: the same bits."""

import pytest
import torch

import decode_cases
from noria.encodings import _kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", decode_cases.DTYPES)
def test_a_kernel_gives_the_bits_of_its_encoding(dtype):
    wrong = [case for case in decode_cases.CASES if decode_cases.other_bits(case, torch.device("cuda"), dtype)]
    assert wrong == []


@pytest.mark.parametrize("dtype", decode_cases.DTYPES)
def test_kernels_are_built_here(dtype):
    for encoding in {case.encoding for case in decode_cases.CASES}:
        assert _kernels.decoder(encoding, torch.device("cuda:0"), dtype)[1] == ""
