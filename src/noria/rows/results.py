"""What a step says of a row: its new token with what was asked for beside it, and whether the row ends. Knows no slots."""

from collections.abc import Container

import numpy as np

from noria.errors import InputError
from noria.rows.ends import finish_reason
from noria.rows.sequence import Sequence
from noria.sampling import Sampling
from noria.step import NO_TOKEN, NONE_LEFT, Result

# Keys that may leave a row no token.
EXCLUDING = (
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def take_sample(sequence: Sequence, result: Result, place: int, ends: tuple[Container[int], int] | None) -> None:
    """Takes in what sample `place` of a step says of this sequence, which has all tokens before it. ends: the model's end tokens
    and the positions of its context, where the token may end the sequence by itself."""
    token_id = int(result.token_ids[place])
    if token_id == NO_TOKEN:
        sequence.error = f"logits are not finite after {len(sequence.token_ids)} tokens"
    elif token_id == NONE_LEFT:
        sequence.error = (sequence.guide and sequence.guide.error) or _none_left(sequence)
    else:
        _take_token(sequence, token_id, result, place)
        prompt = len(sequence.prompt_token_ids)
        _look(
            sequence, finish_reason(sequence.token_ids, sequence.sampling, ends[0], prompt, ends[1]) if ends else "none"
        )


def _take_token(sequence: Sequence, token_id: int, result: Result, place: int) -> None:
    """A new token of a sequence, with its log-probabilities."""
    sampling = sequence.sampling
    sequence.token_ids.append(token_id)
    if sampling.logprobs is not None:
        sequence.logprobs.append(float(result.logprobs[place]))
        if sampling.logprobs:
            top = slice(0, sampling.logprobs)
            # copies: a view would keep the whole step's result, which is often page-locked
            sequence.top.append((result.top_ids[place, top].copy(), result.top_logprobs[place, top].copy()))


def _look(sequence: Sequence, reason: str) -> None:
    """Whether the last token ends the sequence, by itself for this reason, or by the text that is there now."""
    try:
        if sequence.guide is not None:
            sequence.guide.add(sequence.token_ids)
            sequence.error = sequence.guide.error
        if sequence.stop_texts and reason != "stop":
            sequence.text_end = sequence.stop_texts.find(sequence.token_ids)
    except InputError as error:
        sequence.error = str(error)
    sequence.finish_reason = reason if sequence.text_end is None else "stop"


def take_scores(sequence: Sequence, position: int, values: np.ndarray) -> None:
    """Log-probabilities of a prompt's tokens, of those behind this position, if it asked for them."""
    if sequence.prompt_logprobs is None or not len(values):
        return
    sequence.prompt_logprobs[position + 1 : position + 1 + len(values)] = values
    if np.isnan(values).any():
        sequence.error = f"logits are not finite in the prompt, before token {position + len(values)}"


def _none_left(sequence: Sequence) -> str:
    """What is said of a row whose own settings leave no token: those that can, by name."""
    default, sampling = Sampling(), sequence.sampling
    named = [name for name in EXCLUDING if getattr(sampling, name, None) != getattr(default, name, None)]
    given = ", ".join(f"{name} {str(getattr(sampling, name))[:40]}" for name in named) or "the settings of the row"
    return (
        f"no token is left after {len(sequence.token_ids)} tokens: {given}: they exclude all, or make logits infinite"
    )
