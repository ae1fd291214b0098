"""Rows that an earlier job stopped half-way: its tokens become the beginning of the new sequence. Knows no files."""

from noria.files.generations import Generation


def take_up(sequence, begun: Generation) -> None:
    """Gives a sequence that has only its prompt the tokens, and their log-probabilities, of the same row's sealed part.

    Nothing if its prompt has other tokens now, or if it asks for log-probabilities that the part does not have.
    """
    asked = sequence.sampling.logprobs
    lacking = (asked is not None and begun.logprobs is None) or (asked and begun.top_ids is None)
    if begun.prompt_token_ids.tolist() != sequence.prompt_token_ids or lacking:
        return
    sequence.token_ids = begun.token_ids.tolist()
    if asked is not None:
        sequence.logprobs = begun.logprobs.tolist()
    if asked:
        sequence.top = list(zip(begun.top_ids, begun.top_logprobs, strict=True))
