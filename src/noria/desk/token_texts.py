"""The texts of an output's tokens, which its checkpoint's tokenizer knows: found again beside the output.

Reads checkpoints; knows no rows.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from noria.checkpoint.checkpoint import open_checkpoint
from noria.errors import InputError
from noria.output.export_openai import NoTexts, TokenTexts
from noria.output.export_rows import Origin
from noria.rows.pieces import Pieces
from noria.rows.tokenizer import tokenizer_of

NO_MODEL = "none"  # of --model: tokens are written as their ids


def token_texts(model: str | None) -> Callable[[Origin], TokenTexts]:
    """What finds the texts of an output's tokens: in the checkpoint `model`, or (None) in the one that its run named, which
    lies where it lay, seen from here or from the output's folder.

    It raises InputError where that is not there, or another one.
    """

    def find(origin: Origin) -> TokenTexts:
        if model == NO_MODEL:
            return NoTexts()
        named = model or origin.model
        folders = [Path(), *([] if model else [origin.path.parent])]
        found = [place for folder in folders if named and (place := folder / named).is_file()]
        for place in found:
            if (texts := _texts_of(place, origin.checkpoint)) is not None:
                return texts
        what = f"{found[0]} is another checkpoint" if found else f"{named} is not there" if named else "it is not named"
        raise InputError(
            f"{origin.path} holds log-probabilities, and the texts of their tokens are in its checkpoint ({what}): name it"
            f" with --model FILE.h5, or --model {NO_MODEL} writes token_id:N for each token"
        )

    return find


def _texts_of(path: Path, header_hash: str) -> TokenTexts | None:
    """The texts of a checkpoint's tokens; None if it is not the one of this hash."""
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        if checkpoint.header_hash != header_hash:
            return None
        tokenizer = tokenizer_of(checkpoint)
    return Pieces(tokenizer) if tokenizer.vocab_size else NoTexts()
