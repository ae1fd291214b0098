"""Rows that an earlier job stopped half-way: its tokens become the beginning of the new sequence. Knows no files."""

from noria.output.generations import Generation
from noria.rows.sequence import Sequence


def take_up(sequence: Sequence, begun: Generation) -> None:
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
