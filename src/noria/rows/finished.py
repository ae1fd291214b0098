"""A sequence as the row that is written for it. Knows no file format and no schedule."""

import numpy as np

from noria.files.generations import Generation
from noria.rows.tokenizer import Tokenizer


def take_up(sequence, generation: Generation) -> None:
    """Gives a sequence that has only its prompt what an earlier job generated for the same row before it stopped."""
    if generation.prompt_token_ids.tolist() == sequence.prompt_token_ids:
        sequence.token_ids = generation.token_ids.tolist()


def generation(sequence, tokenizer: Tokenizer) -> Generation:
    """The row of a sequence: `done`, `error` if it has one, or `todo` if it was stopped half-way.

    `sequence` has .prompt (Prompt), .prompt_token_ids, .token_ids (generated), .finish_reason and .error ("" : none).
    The end token that stopped it is in `token_ids` and not in `text`.
    """
    prompt, reason = sequence.prompt, sequence.finish_reason
    if sequence.error:
        status, reason, text = "error", "error", ""
    else:
        status = "todo" if reason == "none" else "done"
        text = tokenizer.decode(sequence.token_ids[:-1] if reason == "stop" else sequence.token_ids)
    return Generation(
        row=prompt.row,
        id=prompt.id,
        sample=0,
        status=status,
        finish_reason=reason,
        prompt=prompt.prompt,
        text=text,
        token_ids=np.array(sequence.token_ids, np.int32),
        prompt_token_ids=np.array(sequence.prompt_token_ids, np.int32),
        error=sequence.error or "",
        extra=prompt.extra,
        logprobs=None,
    )
