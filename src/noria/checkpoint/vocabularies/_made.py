"""What is made of a tokenizer's file, and the pipeline of tokens that are runs of bytes, in the order of their ranks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from noria.errors import InputError, require
from noria.tools.text import byte_letters, plural

REMEDY = "save a tokenizer.json with its makers' code, or remove the file if all rows have token_ids"
MAX_TOKENS = 1 << 22
MAX_TOKEN_NBYTES = 1024  # far more than any has that is published: splits of it are counted
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}  # tokenizer.json as it is


@dataclass(frozen=True)
class Made:
    """The text of a tokenizer.json, the settings that go with it, and what was found, in words."""

    tokenizer: bytes
    settings: dict[str, Any]
    words: str


def with_code_left_out(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a tokenizer whose makers' code is not needed any more."""
    return {name: value for name, value in settings.items() if name != "auto_map"} | FAST


def byte_pieces(where: str, tokens: Sequence[bytes], pattern: str, first: int, before: Mapping[str, int]) -> Backend:
    """Byte-level BPE as tiktoken computes it: words by `pattern`; a word that is a token stays whole, else the two
    neighbours that make the token of the lowest rank are joined, again and again.

    tokens: by rank, whose ids begin with `first`; `before`: other texts of the vocabulary and their ids. Raises InputError.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    require(len(ranks) == len(tokens), f"{where}: a token is there twice: {REMEDY}")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    require(not lacking, f"{where}: no token for {plural(len(lacking), 'byte')} of 256: {REMEDY}")
    letters = {byte: letter for letter, byte in byte_letters().items()}
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in tokens}
    vocabulary = {**before, **{spelled[token]: first + rank for token, rank in ranks.items()}}
    twice = len(vocabulary) != len(before) + len(tokens)
    require(not twice, f"{where}: a special token has the text of another token: {REMEDY}")
    merges = [(spelled[left], spelled[right]) for token in tokens for left, right in _splits(token, ranks)]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_compiled(where, pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _splits(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that make this one, those of low ranks first."""
    pairs = ((token[:place], token[place:]) for place in range(1, len(token)))
    found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _compiled(where: str, pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # tokenizers raises no other
        raise InputError(
            f"{where}: the pattern {pattern[:80]!r} cannot be read ({str(error)[:120]}): {REMEDY}"
        ) from error


def add_special(where: str, backend: Backend, tokens: Mapping[int, AddedToken]) -> None:
    """Adds special tokens, which get the ids that they should have. Raises InputError if they would get others."""
    backend.add_tokens([token for _, token in sorted(tokens.items())])
    for token_id, token in tokens.items():
        found = backend.token_to_id(token.content)
        require(
            found == token_id,
            f"{where}: the special token {token.content[:40]!r} has id {token_id}, which would become {found}: {REMEDY}",
        )


def begin_and_end(backend: Backend, begin: str | None, end: str | None) -> None:
    """Puts these tokens around every text."""
    single = [piece for piece in (begin, "$A", end) if piece is not None]
    if len(single) > 1:
        ids = [(piece, backend.token_to_id(piece)) for piece in (begin, end) if piece is not None]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def numbered(where: str, tree: Any) -> Iterator[tuple[int, AddedToken]]:
    """The tokens of `added_tokens_decoder` by id. Raises InputError."""
    require(isinstance(tree, dict), f"{where}: added_tokens_decoder is {json.dumps(tree)[:60]}: it must be an object")
    for key, one in tree.items():
        text = one.get("content") if isinstance(one, dict) else one
        right = (
            isinstance(key, str)
            and key.isascii()
            and key.isdigit()
            and len(key) < 10
            and isinstance(text, str)
            and text
        )
        require(right, f"{where}: added_tokens_decoder has {key[:20]!r}: {str(one)[:60]}: it must be an id and a token")
        special = not isinstance(one, dict) or one.get("special") is not False
        yield int(key), AddedToken(text, normalized=False, special=special)
