"""Trials of kernels: what they say, why kernels cannot be built, and memory, which says nothing of them."""

import pytest
import torch

from noria.kernels.trying import tried


def test_a_trial_says_what_is_wrong_and_nothing_where_kernels_serve():
    assert tried(lambda: "") == "" and tried(lambda: "it gives other bits") == "it gives other bits"


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("no compiler\nand more"), "no compiler"), (KeyError(), "KeyError")]
)
def test_what_a_compiler_raises_is_said_in_one_line(error, said):
    def trial():
        raise error

    assert tried(trial, "they") == f"they cannot be built: {said}"


def test_memory_that_is_short_says_nothing_of_kernels():
    def trial():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        tried(trial)
