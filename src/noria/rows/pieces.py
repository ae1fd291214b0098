"""What each generated token adds to a row's text, in bytes. Knows no rows and no files.

A character may be several tokens, and a row's text may end within a token: joined, the pieces are the text as it is.
"""

import functools
from collections.abc import Sequence

from noria.rows.decoding import Writer
from noria.rows.tokenizer import Tokenizer
from noria.tools.text import REPLACEMENT, storable

_CUT = REPLACEMENT.encode()
_NEAR = 64  # tokens that are more than a writer looks back


class Pieces:
    """The tokens of one tokenizer as bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_ids.values())
        self.spelled = functools.cache(tokenizer.spelled)

    def of(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        text: str,
        to_the_end: bool,
        num_thought: int | None = None,
    ) -> list[bytes | None]:
        """The pieces of a row's tokens, which joined are its `text` in UTF-8. [tokens], or fewer: those behind the end of the
        text (a stop text, an end token) have none, unless the row went on `to_the_end` of its tokens.

        `num_thought`: of a row whose reasoning is kept apart, its tokens; None of any other. What stands before its answer
        is None.
        """
        wanted, start = text.encode(), 0
        for left_out in (self._special, frozenset[int]()):
            spelled = [b"" if one in left_out else self.spelled(one) or b"" for one in token_ids]
            pieces = _as_decoded(spelled)
            joined = b"".join(pieces)
            if num_thought is not None:
                start = max(joined.rfind(wanted, len(b"".join(pieces[:num_thought]))), 0)
            if joined.startswith(wanted, start):
                break
        else:
            pieces, start = self._by_writing(prompt_token_ids, token_ids, text), 0
        found = _between(pieces, start, start + len(wanted))
        while found and not found[-1] and not to_the_end:
            found.pop()
        return found

    def _by_writing(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], text: str) -> list[bytes]:
        """The same by what the tokenizer writes after each token: slower, for those whose spelling is not their text."""
        found = [_written(self._tokenizer.writer(skip), prompt_token_ids, token_ids, text) for skip in (True, False)]
        pieces, rest = min(found, key=lambda one: len(one[1]))
        if pieces:
            pieces[-1] += rest.encode()
        return pieces


def _written(
    writer: Writer, prompt_token_ids: Sequence[int], token_ids: Sequence[int], text: str
) -> tuple[list[bytes], str]:
    """What the writer adds with each token, and the rest of the text, in which they do not agree."""
    pieces = [b""] * len(token_ids)
    start = place = 0  # the first token of a character that is not whole yet, and where it begins in the text
    for index in range(len(token_ids)):
        before = [*prompt_token_ids[-_NEAR:], *token_ids[max(start - _NEAR, 0) : start]]
        added = storable(writer.continuation(before, token_ids[start : index + 1]))
        if added and text.startswith(added, place):
            pieces[index], place, start = added.encode(), place + len(added), index + 1
    return pieces, text[place:]


def _between(pieces: list[bytes], start: int, stop: int) -> list[bytes | None]:
    """What of each piece lies between these bytes of all; None for one that ends where they begin, or before."""
    found, place = list[bytes | None](), 0
    for piece in pieces:
        end = place + len(piece)
        found.append(None if start and end <= start else piece[max(start - place, 0) : max(stop - place, 0)])
        place = end
    return found


def _as_decoded(spelled: list[bytes]) -> list[bytes]:
    """The bytes that the text has where tokens are no whole characters: the last token of what is none has U+FFFD."""
    joined, place, wrong = b"".join(spelled), 0, list[tuple[int, int]]()
    while True:
        try:
            joined[place:].decode()
            break
        except UnicodeDecodeError as error:
            wrong.append((place + error.start, place + error.end))
            place += error.end
    if not wrong and b"\0" not in joined:
        return spelled
    replaced = {end - 1: _CUT for _, end in wrong}
    gone = {place for start, end in wrong for place in range(start, end)}
    pieces, place = [], 0
    for piece in spelled:
        kept = (
            replaced.get(place + index, b"" if place + index in gone else piece[index : index + 1])
            for index in range(len(piece))
        )
        pieces.append(b"".join(kept).replace(b"\0", _CUT))
        place += len(piece)
    return pieces
