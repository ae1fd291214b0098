"""A sequence as the row that is written for it, and back: what a job stopped half-way, the next one goes on from.

Knows no file format and no schedule.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from noria.errors import InputError
from noria.output.schema import Generation
from noria.rows import sequence as sequences
from noria.rows.ends import StopTexts, ends, with_special_stops
from noria.rows.prompts import json_text
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling

CUT = "truncated_prompt_tokens"  # the column of how many tokens truncate_prompt_tokens cut off


def generation(sequence: sequences.Sequence, tokenizer: Tokenizer, dtype: type = np.float32) -> Generation:
    """The row of a sequence: `done`, `error` if it has one, or `todo` if it was stopped half-way.

    Its token_ids are those generated. The end token that stopped it is in
    `token_ids` and not in `text`, nor is the stop text, unless sampling.include_stop_str_in_output; tokens that the
    tokenizer cannot write are an error too. Log-probabilities are kept in `dtype`.
    """
    prompt, reason = sequence.prompt, sequence.finish_reason
    text, thought, error = _texts(sequence, tokenizer)
    if error:
        status, reason = "error", "error"
    else:
        status = "todo" if reason == "none" else "done"
    return Generation(
        row=prompt.row,
        id=prompt.id,
        sample=sequence.sample,
        status=status,
        finish_reason=reason,
        prompt=prompt.prompt,
        text=text,
        token_ids=np.array(sequence.token_ids, np.int32),
        prompt_token_ids=np.array(sequence.prompt_token_ids, np.int32),
        error=error,
        extra=_extra(sequence),
        cached_tokens=sequence.cached_tokens,
        **thought,
        **_scores(sequence, dtype),
    )


def _extra(sequence: sequences.Sequence) -> str:
    """The user's own columns, with the number of tokens that were cut off the prompt where cutting was asked for."""
    extra = sequence.prompt.extra
    if sequence.error or sequence.sampling.truncate_prompt_tokens is None:
        return extra
    own = json.loads(extra) if extra else {}
    if CUT in own:
        own[f"input_{CUT}"] = own.pop(CUT)
    return json_text(own | {CUT: sequence.num_cut})


def num_cut(written: Generation) -> int:
    """How many tokens were cut off the prompt of a row that is written already."""
    found = json.loads(written.extra).get(CUT) if CUT in written.extra else 0
    return found if isinstance(found, int) else 0


def _texts(sequence: sequences.Sequence, tokenizer: Tokenizer) -> tuple[str, dict[str, Any], str]:
    """What a sequence says, what it has thought where that is kept apart, and why it says nothing if it has or makes an
    error."""
    reasoning = sequence.guide.reasoning if sequence.guide is not None else None
    thought: dict[str, Any] = {} if reasoning is None else {"reasoning": ""}
    if sequence.error:
        return "", thought, sequence.error
    sampling, written = sequence.sampling, sequence.token_ids
    if sequence.text_end is None and sequence.finish_reason == "stop" and not sampling.include_stop_str_in_output:
        written = written[:-1]
    try:
        if reasoning is not None:
            thought["reasoning"], text = reasoning.split(written, sequence.text_end)
            thought["reasoning_tokens"] = reasoning.num_tokens(written)
            return text, thought, ""
        writer = tokenizer.writer(sampling.skip_special_tokens)
        return writer.continuation(sequence.prompt_token_ids, written)[: sequence.text_end], thought, ""
    except InputError as error:  # half of a text may be what the whole is not
        return "", thought, "" if sequence.finish_reason == "none" else str(error)


def text_again(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    sampling: Sampling,
    finish_reason: str,
) -> str:
    """The text of a row that is written already, anew from its tokens, by the row's own settings.

    Whether a token or a text stopped it is found out anew too. Raises InputError if the tokenizer cannot write them.
    """
    sampling = with_special_stops(sampling, tokenizer.special_ids)
    writer, written, end = tokenizer.writer(sampling.skip_special_tokens), list(token_ids), None
    if finish_reason == "stop" and not ends(written[-1], sampling, tokenizer.end_token_ids):
        end = StopTexts(sampling, writer, prompt_token_ids).place(written) if sampling.stop_texts else None
    elif finish_reason == "stop" and not sampling.include_stop_str_in_output:
        written = written[:-1]
    return writer.continuation(prompt_token_ids, written)[:end]


def _scores(sequence: sequences.Sequence, dtype: type) -> dict[str, Any]:
    """The log-probabilities that the row asked for, of as many tokens as it has."""
    asked = sequence.sampling.logprobs
    scores: dict[str, Any] = {}
    if asked is not None and sequence.sampling.max_new_tokens != 0:
        scores["logprobs"] = np.array(sequence.logprobs, dtype)
        if asked:
            shape = (len(sequence.top), asked if not sequence.top else -1)
            scores["top_ids"] = np.array([ids for ids, _ in sequence.top], np.int32).reshape(shape)
            scores["top_logprobs"] = np.array([values for _, values in sequence.top], dtype).reshape(shape)
    if sequence.prompt_logprobs is not None:
        scores["prompt_logprobs"] = sequence.prompt_logprobs.astype(dtype)
    return scores


def take_up(sequence: sequences.Sequence, begun: Generation) -> None:
    """Gives a sequence that has only its prompt the tokens, and their log-probabilities, of the same row's sealed part.

    Nothing if its prompt has other tokens now, or if it asks for log-probabilities that the part does not have.
    """
    asked, logprobs, top_ids, top_logprobs = (
        sequence.sampling.logprobs,
        begun.logprobs,
        begun.top_ids,
        begun.top_logprobs,
    )
    lacking = (asked is not None and logprobs is None) or (asked and top_ids is None)
    if begun.prompt_token_ids.tolist() != sequence.prompt_token_ids or lacking:
        return
    sequence.token_ids = begun.token_ids.tolist()
    if asked is not None and logprobs is not None:
        sequence.logprobs = logprobs.tolist()
    if asked and top_ids is not None and top_logprobs is not None:
        sequence.top = list(zip(top_ids, top_logprobs, strict=True))
