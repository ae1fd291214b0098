"""Mistral's tekken.json: tokens by rank with their bytes in base64, the pattern of words, special tokens before all others.

As mistral-common reads it. Text begins with <s>, as in the tokenizer.json that Mistral publishes.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from noria.checkpoint.checkpoint import parse_json
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.vocabularies._made import (
    MAX_TOKEN_NBYTES,
    MAX_TOKENS,
    REMEDY,
    Made,
    add_special,
    begin_and_end,
    byte_pieces,
    with_code_left_out,
)
from noria.errors import InputError, require
from noria.tools.text import plural

NAMES = ("tekken.json",)
_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# Of files up to version 7, which may leave them out.
_OLDER = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG]"
    " <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
_OLDER_VERSIONS = ("v1", "v2", "v3", "v7")


def has(content: bytes) -> bool:
    return content.lstrip()[:1] == b"{"


def made(directory: Directory, name: str, settings: Mapping[str, Any]) -> Made:
    """Raises InputError for a damaged file."""
    where = str(directory.path / name)
    tree = parse_json(directory.content(name) or b"", where)
    config = tree.get("config")
    pattern = config.get("pattern") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(pattern, str):
        raise InputError(f"{where} has no config with a pattern: {REMEDY}")
    special = _special(where, tree, config)
    tokens = _tokens(where, tree, config, len(special))
    backend = byte_pieces(where, tokens, pattern, len(special), {text: place for place, text in enumerate(special)})
    add_special(
        where, backend, {place: AddedToken(text, normalized=False, special=True) for place, text in enumerate(special)}
    )
    begin_and_end(backend, "<s>" if "<s>" in special else None, None)
    named = {name: text for name, text in _NAMED.items() if text in special}
    words = f"{plural(len(tokens), 'token')} and {len(special):,} special ones"
    return Made(backend.to_str().encode(), {**named, **with_code_left_out(settings)}, words)


def _special(where: str, tree: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Special tokens by id: those that have a name, and <SPECIAL_20>, ... for the others."""
    given, version = tree.get("special_tokens"), config.get("version")
    if given is None:
        require(
            version in _OLDER_VERSIONS, f"{where}: special_tokens is missing (version {str(version)[:20]}): {REMEDY}"
        )
        given = [{"rank": place, "token_str": text} for place, text in enumerate(_OLDER)]
    right = isinstance(given, list) and all(isinstance(one, dict) for one in given)
    require(right, f"{where}: special_tokens is {str(given)[:60]}: it must be a list of objects")
    by_rank = {one.get("rank"): one.get("token_str") for one in given}
    texts = [by_rank.get(place) for place in range(len(given))]
    right = all(isinstance(text, str) and text for text in texts) and len({*texts}) == len(texts)
    require(right, f"{where}: the ranks of special_tokens are not 0 to {len(texts) - 1} with a text each: {REMEDY}")
    count = _count(where, config, "default_num_special_tokens", len(texts))
    require(count >= len(texts), f"{where}: default_num_special_tokens is {count}, there are {len(texts)}: {REMEDY}")
    return [str(text) for text in texts] + [f"<SPECIAL_{place}>" for place in range(len(texts), count)]


def _tokens(where: str, tree: Mapping[str, Any], config: Mapping[str, Any], num_special: int) -> list[bytes]:
    """Tokens by rank; a file may have more than its model."""
    given = tree.get("vocab")
    require(isinstance(given, list) and given, f"{where}: vocab is {str(given)[:60]}: it must be a list of tokens")
    assert isinstance(given, list)
    count = _count(where, config, "default_vocab_size", len(given) + num_special) - num_special
    require(
        0 < count <= len(given),
        f"{where}: default_vocab_size is {count + num_special}, but vocab has {len(given)} and there are {num_special} special"
        f" tokens: {REMEDY}",
    )
    tokens = []
    for place, one in enumerate(given[:count]):
        try:
            token = base64.b64decode(one["token_bytes"], validate=True)
            right = one["rank"] == place and 0 < len(token) <= MAX_TOKEN_NBYTES
        except (TypeError, KeyError, ValueError, binascii.Error):
            token, right = b"", False
        require(
            right, f"{where}: vocab[{place}] is {str(one)[:60]}: it must have rank {place} and token_bytes in base64"
        )
        tokens.append(token)
    return tokens


def _count(where: str, config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    right = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_TOKENS
    require(right, f"{where}: {key} is {str(value)[:40]}: it must be a whole number of 1 to {MAX_TOKENS}")
    return int(value)
