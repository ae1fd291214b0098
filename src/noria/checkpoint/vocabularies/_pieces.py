"""What a sentencepiece model says (sentencepiece_model.proto): pieces with scores, and how text is normalized."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from noria.checkpoint.vocabularies._made import MAX_TOKENS, REMEDY
from noria.checkpoint.vocabularies._protobuf import Value, fields, real, text
from noria.errors import InputError, require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models
SPACE = "▁"  # how a piece spells a space
_OTHERS = {3: "words", 4: "characters"}


@dataclass(frozen=True)
class ScoredPiece:
    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class PieceModel:
    """pieces: by id; unknown, begin, end: ids of special tokens, -1 where there is none. prefix: a space is put before a
    text; spaces_removed: of several in a row, and those around a text; beyond: what of it is not computed here, in words.
    """

    kind: int
    pieces: list[ScoredPiece]
    byte_fallback: bool
    unknown: int
    begin: int
    end: int
    prefix: bool
    spaces_removed: bool
    beyond: str

    def of_kind(self, *kinds: int) -> dict[int, ScoredPiece]:
        """The pieces of these kinds by id."""
        return {place: piece for place, piece in enumerate(self.pieces) if piece.kind in kinds}

    def named(self, place: int) -> str | None:
        """The text of a special token."""
        return self.pieces[place].text if 0 <= place < len(self.pieces) else None


def read(where: str, content: bytes) -> PieceModel:
    """The model in a file. Raises InputError for a damaged one, and for what is not computed here."""
    try:
        model = _read(content)
    except (ValueError, MemoryError) as error:
        raise InputError(f"{where} is no model of sentencepiece ({str(error)[:80]}): download it again") from error
    texts = {piece.text for piece in model.pieces}
    right = 0 < len(texts) == len(model.pieces) <= MAX_TOKENS and all(
        math.isfinite(piece.score) for piece in model.pieces
    )
    require(right, f"{where}: {len(model.pieces)} pieces, {len(texts)} of them different: download it again")
    what = _OTHERS.get(model.kind, f"type {model.kind}")
    require(model.kind in (UNIGRAM, BPE), f"{where}: it is a model of {what}, neither BPE nor Unigram: {REMEDY}")
    require(not model.beyond, f"{where}: {model.beyond}, which this version of Noria does not do: {REMEDY}")
    own = [piece.text for piece in model.of_kind(USER_DEFINED).values() if SPACE in piece.text or " " in piece.text]
    require(
        not (own and model.spaces_removed), f"{where}: spaces are removed, and pieces of its own have some: {REMEDY}"
    )
    unused = next(iter(model.of_kind(UNUSED).values()), None)
    require(unused is None, f"{where}: its piece {unused and unused.text[:40]!r} is marked as unused: {REMEDY}")
    require(model.named(model.unknown) is not None, f"{where}: unk_id is {model.unknown}, which is no piece: {REMEDY}")
    return model


def renamed(model: PieceModel, names: Mapping[int, str]) -> PieceModel:
    """The same where some pieces, placeholders of training, have other names, but for names that other pieces have."""
    taken = {piece.text for place, piece in enumerate(model.pieces) if place not in names}
    wanted = {place: name for place, name in names.items() if name not in taken}
    return replace(
        model,
        pieces=[replace(piece, text=wanted.get(place, piece.text)) for place, piece in enumerate(model.pieces)],
    )


def _read(content: bytes) -> PieceModel:
    pieces, specs = list[ScoredPiece](), dict[int, dict[int, Value]]()
    for number, value in fields(content):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number in (2, 3, 5):
            specs[number] = dict(fields(_message(value)))
    trainer, normalizer, denormalizer = (specs.get(number, {}) for number in (2, 3, 5))
    beyond = (
        (trainer.get(24, 0), "spaces belong to the words before them"),
        (not normalizer.get(5, 1), "spaces stay as they are"),
        (normalizer.get(2) or denormalizer.get(2), "text is normalized by a table of characters"),
    )
    return PieceModel(
        kind=_whole(trainer.get(3, UNIGRAM)),
        pieces=pieces,
        byte_fallback=bool(trainer.get(35, 0)),
        unknown=_whole(trainer.get(40, 0)),
        begin=_whole(trainer.get(41, 1)),
        end=_whole(trainer.get(42, 2)),
        prefix=bool(normalizer.get(3, 1)),
        spaces_removed=bool(normalizer.get(4, 1)),
        beyond=next((words for there, words in beyond if there), ""),
    )


def _piece(message: bytes) -> ScoredPiece:
    its = dict(fields(message))
    return ScoredPiece(text(its.get(1, b"")), real(its.get(2, bytes(4))), _whole(its.get(3, NORMAL)))


def _message(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message should be")
    return value


def _whole(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number should be")
    return value
