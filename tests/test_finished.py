"""A sequence as the row that is written for it."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from noria.rows.finished import generation
from noria.rows.prompts import Prompt


@dataclass
class Sequence:
    prompt: Prompt
    prompt_token_ids: list = field(default_factory=lambda: [1, 2])
    token_ids: list = field(default_factory=lambda: [5, 6, 9])
    finish_reason: str = "none"
    error: str = ""


class Letters:
    """A tokenizer without special tokens: 5 is f, 6 is g."""

    def decode(self, token_ids):
        return "".join(chr(ord("a") + token_id) for token_id in token_ids)


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
