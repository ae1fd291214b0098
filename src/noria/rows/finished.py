"""A sequence as the row that is written for it. Knows no file format and no schedule."""

import numpy as np

from noria.files.generations import Generation
from noria.rows.tokenizer import Tokenizer


def generation(sequence, tokenizer: Tokenizer, dtype: type = np.float32) -> Generation:
    """The row of a sequence: `done`, `error` if it has one, or `todo` if it was stopped half-way.

    `sequence` is a rows.sequence.Sequence; its token_ids are those generated. The end token that stopped it is in
    `token_ids` and not in `text`, nor is the stop text. Log-probabilities are kept in `dtype`.
    """
    prompt, reason = sequence.prompt, sequence.finish_reason
    if sequence.error:
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
        text="" if sequence.error else _text(sequence, tokenizer),
        token_ids=np.array(sequence.token_ids, np.int32),
        prompt_token_ids=np.array(sequence.prompt_token_ids, np.int32),
        error=sequence.error or "",
        extra=prompt.extra,
        **_scores(sequence, dtype),
    )


def _text(sequence, tokenizer: Tokenizer) -> str:
    if sequence.text_end is not None:
        return tokenizer.decode(sequence.token_ids)[: sequence.text_end]
    ended = sequence.finish_reason == "stop"
    return tokenizer.decode(sequence.token_ids[:-1] if ended else sequence.token_ids)


def _scores(sequence, dtype: type) -> dict[str, np.ndarray]:
    """The log-probabilities that the row asked for, of as many tokens as it has."""
    scores, asked = {}, sequence.sampling.logprobs
    if asked is not None and sequence.sampling.max_new_tokens:
        scores["logprobs"] = np.array(sequence.logprobs, dtype)
        if asked:
            shape = (len(sequence.top), asked if not sequence.top else -1)
            scores["top_ids"] = np.array([ids for ids, _ in sequence.top], np.int32).reshape(shape)
            scores["top_logprobs"] = np.array([values for _, values in sequence.top], dtype).reshape(shape)
    if sequence.prompt_logprobs is not None:
        scores["prompt_logprobs"] = sequence.prompt_logprobs.astype(dtype)
    return scores
