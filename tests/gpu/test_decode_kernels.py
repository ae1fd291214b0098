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
        assert _kernels.encoder(encoding, torch.device("cuda:0"))[1] == ""


@pytest.mark.parametrize("dtype", decode_cases.DTYPES)
def test_numbers_and_scales_of_every_magnitude_are_decoded(dtype):
    for case, fields in decode_cases.extremes():
        assert decode_cases.differences(case, fields, torch.device("cuda"), dtype) == 0, case


@pytest.mark.parametrize("dtype", decode_cases.DTYPES)
def test_fields_of_any_bytes_are_decoded_within_their_memory(dtype):
    for case, fields in decode_cases.hostile():
        assert decode_cases.changed_around(case, fields, torch.device("cuda"), dtype) == 0, case


def test_pieces_that_a_list_on_the_device_names_are_decoded_and_no_others():
    wrong = [case for case in decode_cases.CASES if decode_cases.listed_bits(case, torch.device("cuda"), torch.float16)]
    assert wrong == []


def test_a_kernel_gives_the_bytes_of_its_encoding():
    assert [case for case in decode_cases.CODED if decode_cases.other_bytes(case, torch.device("cuda"))] == []
