"""Kernels that draw tokens, in Triton's interpreter, beside the plain sampler.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6). Where
there is a GPU, gpu/test_sampling_kernels.py runs the compiled kernels.
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

with pytest.MonkeyPatch.context() as patch:  # what is imported now is interpreted
    patch.setenv("TRITON_INTERPRET", "1")
    import noria.kernels.sampling  # noqa: F401

import sampling_cases
from counts import full
from noria.kernels import drawing

CPU = torch.device("cpu")
EVERY = 1 if full() else 61  # the interpreter takes 0.1 s a row


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", sampling_cases.VOCABS)
def test_a_row_gets_the_token_of_the_plain_sampler(vocab, dtype):
    assert sampling_cases.otherwise_drawn(vocab, dtype, CPU, EVERY) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logprobs_are_those_of_log_softmax(dtype):
    assert sampling_cases.error_of_logprobs(dtype, CPU) < 1e-12


@pytest.mark.parametrize("vocab", [8, 3001])
def test_they_pass_their_own_check(vocab):
    assert drawing.draws(CPU, torch.float16, vocab)


@pytest.mark.slow
def test_a_sampler_draws_by_kernels_what_it_draws_without():
    sampling_cases.check_sampler(CPU, torch.float16)
