"""Tokens as text: what new tokens add to the text of the tokens before them. Knows no rows and no files.

The text of two lists of tokens is not the text of the first and then that of the second: decoders of the sentencepiece
kind take the space away from the first token of all, and a character may be cut between two tokens.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from noria.tools.text import byte_letters

CUT = "\N{REPLACEMENT CHARACTER}"  # how a character that is not whole yet is decoded
_NEAR = 8  # tokens with a text: see Writer.context
_CUT_TOKENS = 3  # that may hold the beginning of a character of UTF-8, which has 4 bytes at most
_BYTE = re.compile(r"<0x[0-9A-F]{2}>").fullmatch


@dataclass(frozen=True)
class Writer:
    """Writes token ids. `decode` is the text of token ids that stand alone, `piece` how a vocabulary spells a token that
    has a text, and None for one that has none: a special token that is left out, an id that the tokenizer lacks.
    """

    decode: Callable[[Sequence[int]], str]
    piece: Callable[[int], str | None]

    def context(self, token_ids: Sequence[int]) -> list[int]:
        """The last few of these tokens: what follows reads the same after them as after all.

        A decoder treats the first token of all in its own way (sentencepiece's space, WordPiece's, the `▁` that a
        normalizer put before the text); all others are written one by one but for characters that are cut. So one token
        with a text would do, and three for a character of byte-level tokens, each of which has a byte; clean-up of spaces
        looks back a few characters. Bytes of byte fallback (`<0xE4>`) are decoded a whole run at once, and are characters
        or U+FFFD all together, so that a run is never cut.
        """
        start, near = len(token_ids), 0
        while start and near < _NEAR:
            start -= 1
            piece = self.piece(token_ids[start])
            near += piece is not None and not _BYTE(piece)
        return list(token_ids[start:])

    def continuation(self, before: Sequence[int], new: Sequence[int]) -> str:
        """What `new` adds to the text of `before`: both texts together are that of all tokens.

        A character that is cut between the two belongs to `new`, where it becomes whole.
        """
        context = self.context(before)
        whole, known = self.decode([*context, *new]), self.decode(context)
        if whole.startswith(known):
            return whole[len(known) :]
        shorter = (self.decode(context[: len(context) - count]) for count in range(_CUT_TOKENS + 1))
        return whole[max(common_length(text, whole) for text in shorter) :]


def spelled(piece: str, is_byte_level: bool) -> bytes:
    """The bytes that a piece of a vocabulary stands for: in a byte-level one a letter a byte, else `<0xE4>` is a byte and
    `▁` a space."""
    if is_byte_level:
        with contextlib.suppress(KeyError):
            return bytes(map(byte_letters().__getitem__, piece))
    elif _BYTE(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode(errors="replace")


def common_length(one: str, other: str) -> int:
    """How many characters two texts have in common from the first on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
