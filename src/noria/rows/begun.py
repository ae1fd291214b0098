"""Rows that an earlier job stopped half-way: its tokens become the beginning of the new sequence. Knows no files."""

from noria.files.generations import Generation


def take_up(sequence, begun: Generation) -> None:
    """Gives a sequence that has only its prompt the tokens, and their log-probabilities, of the same row's sealed part.

    Nothing if its prompt has other tokens now.
    """
    if begun.prompt_token_ids.tolist() != sequence.prompt_token_ids:
        return
    sequence.token_ids = begun.token_ids.tolist()
