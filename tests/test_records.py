"""A sequence as the row that is written for it."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from noria.desk.records import generation, text_again
from noria.errors import InputError
from noria.output.export import _hidden
from noria.rows.decoding import Writer
from noria.rows.prompts import Prompt
from noria.sampling import Sampling


@dataclass
class Sequence:
    prompt: Prompt
    prompt_token_ids: list = field(default_factory=lambda: [1, 2])
    token_ids: list = field(default_factory=lambda: [5, 6, 9])
    finish_reason: str = "none"
    error: str = ""
    sample: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: list = field(default_factory=list)
    top: list = field(default_factory=list)
    prompt_logprobs: np.ndarray | None = None
    text_end: int | None = None
    guide: None = None
    cached_tokens: int = 0


class Letters:
    """A tokenizer without special tokens: 5 is f, 6 is g."""

    special_ids, end_token_ids = {}, frozenset([9])

    def decode(self, token_ids):
        return "".join(chr(ord("a") + token_id) for token_id in token_ids)

    def writer(self, skip_special_tokens=True):
        return Writer(self.decode, lambda token_id: self.decode([token_id]))


PROMPT = Prompt(4, "id", "prompt", None, {}, '{"own": 1}', None)


@pytest.mark.parametrize(
    ("finish_reason", "status", "text"), [("stop", "done", "fg"), ("length", "done", "fgj"), ("none", "todo", "fgj")]
)
def test_a_row_has_all_tokens_and_its_text_is_without_the_end_token(finish_reason, status, text):
    row = generation(Sequence(PROMPT, finish_reason=finish_reason), Letters())
    assert (row.row, row.id, row.sample, row.prompt, row.extra) == (4, "id", 0, "prompt", '{"own": 1}')
    assert (row.status, row.finish_reason, row.text, row.error) == (status, finish_reason, text, "")
    assert row.token_ids.dtype == row.prompt_token_ids.dtype == np.int32
    assert (row.token_ids.tolist(), row.prompt_token_ids.tolist(), row.logprobs) == ([5, 6, 9], [1, 2], None)


def test_a_row_that_failed_has_its_error_and_what_was_known():
    row = generation(Sequence(PROMPT, [], [], error="prompt is empty"), Letters())
    assert (row.status, row.finish_reason, row.text, row.error) == ("error", "error", "", "prompt is empty")
    assert len(row.token_ids) == len(row.prompt_token_ids) == 0 and row.extra == PROMPT.extra
    half = generation(Sequence(PROMPT, error="logits are not finite after 3 tokens"), Letters())
    assert (half.status, half.token_ids.tolist()) == ("error", [5, 6, 9])


class Mute(Letters):
    def decode(self, token_ids):
        raise InputError("the tokenizer cannot write these tokens (no)")


def test_a_row_that_the_tokenizer_cannot_write_is_an_error_with_its_tokens_once_it_is_finished():
    row = generation(Sequence(PROMPT, finish_reason="length"), Mute())
    assert (row.status, row.finish_reason, row.text) == ("error", "error", "")
    assert (row.error, row.token_ids.tolist()) == ("the tokenizer cannot write these tokens (no)", [5, 6, 9])
    half = generation(Sequence(PROMPT), Mute())
    assert (half.status, half.text, half.error) == ("todo", "", "")


def test_a_row_that_a_stop_text_ended_has_the_text_before_it():
    row = generation(Sequence(PROMPT, finish_reason="stop", text_end=1, sample=2), Letters())
    assert (row.text, row.token_ids.tolist(), row.finish_reason, row.sample) == ("f", [5, 6, 9], "stop", 2)


def test_a_response_says_how_many_tokens_of_the_prompt_were_shared():
    row = generation(Sequence(PROMPT, finish_reason="stop", cached_tokens=64), Letters())
    assert row.cached_tokens == _hidden(row)["num_cached_tokens"] == 64


@pytest.mark.parametrize(("text_end", "text"), [(2, "fg"), (None, "fgj")])
def test_a_row_keeps_what_ended_it_where_that_is_asked(text_end, text):
    sequence = Sequence(PROMPT, finish_reason="stop", text_end=text_end)
    sequence.sampling = Sampling(include_stop_str_in_output=True)
    assert generation(sequence, Letters()).text == text


@pytest.mark.parametrize(
    ("token_ids", "keys", "reason", "text"),
    [
        ([5, 6, 9], {}, "stop", "fg"),
        ([5, 6, 9], {"include_stop_str_in_output": True}, "stop", "fgj"),
        ([5, 6, 9], {}, "length", "fgj"),
        ([5, 6, 7], {"stop_token_ids": [7]}, "stop", "fg"),
        ([5, 6, 7], {"stop": ["gh", "x"]}, "stop", "f"),
        ([5, 6, 7], {"stop": "gh", "include_stop_str_in_output": True}, "stop", "fgh"),
        ([5, 6, 7], {"stop": "gone"}, "stop", "fgh"),
        ([5, 6, 7], {"stop": "f", "min_new_tokens": 2}, "length", "fgh"),
        ([5, 6, 5], {"stop": "f", "min_new_tokens": 2}, "stop", "fg"),
    ],
)
def test_the_text_of_a_written_row_is_found_anew_from_its_tokens(token_ids, keys, reason, text):
    assert text_again(Letters(), [1, 2], np.array(token_ids), Sampling().override(keys), reason) == text


def test_a_row_has_the_log_probabilities_that_it_asked_for_in_the_precision_of_the_run():
    top = [(np.array([7, 1]), np.array([-0.1, -3.0]))] * 3
    sequence = Sequence(PROMPT, finish_reason="length", logprobs=[-1.0, -0.1, -2.0], top=top)
    sequence.sampling = Sampling(logprobs=2)
    sequence.prompt_logprobs = np.array([np.nan, -0.3])
    row = generation(sequence, Letters(), np.float64)
    assert row.logprobs.tolist() == [-1.0, -0.1, -2.0] and row.logprobs.dtype == np.float64
    assert row.top_ids.tolist() == [[7, 1]] * 3 and row.top_logprobs.shape == (3, 2)
    assert row.prompt_logprobs[1] == -0.3 and generation(sequence, Letters()).prompt_logprobs.dtype == np.float32
    sequence.token_ids, sequence.top, sequence.logprobs, sequence.error = [], [], [], "no"
    assert generation(sequence, Letters()).top_ids.shape == (0, 2)
    sequence.sampling = Sampling(logprobs=0)
    assert generation(sequence, Letters()).top_ids is None
