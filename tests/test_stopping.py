"""When a sequence ends."""

import pytest

from noria.rows.ends import finish_reason
from noria.sampling import Sampling

END = frozenset({2, 7})


@pytest.mark.parametrize(
    ("token_ids", "prompt_length", "sampling", "reason"),
    [
        ([], 3, {}, "none"),
        ([5], 3, {}, "none"),
        ([5, 7], 3, {}, "stop"),
        ([2, 5], 3, {}, "none"),  # asked after every token: an end token further back was gone past with ignore_eos
        ([5, 7], 3, {"ignore_eos": True}, "none"),
        ([5, 6, 5, 6], 3, {}, "length"),
        ([5, 6, 5, 7], 3, {}, "stop"),
        ([5, 6, 5, 7], 3, {"ignore_eos": True}, "length"),
        ([5], 8, {}, "none"),
        ([5], 9, {}, "length"),
        ([7], 9, {}, "stop"),
    ],
)
def test_a_sequence_ends_with_an_end_token_or_at_either_limit(token_ids, prompt_length, sampling, reason):
    settings = Sampling(max_new_tokens=4).override(sampling)
    assert finish_reason(token_ids, settings, END, prompt_length, max_positions=10) == reason


def test_without_end_tokens_a_sequence_runs_to_its_limit():
    assert finish_reason([2], Sampling(max_new_tokens=2), frozenset(), 3, 10) == "none"
    assert finish_reason([2, 2], Sampling(max_new_tokens=2), frozenset(), 3, 10) == "length"
