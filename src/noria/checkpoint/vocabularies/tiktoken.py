"""tiktoken's files of ranks, a line a token: its bytes in base64, and its rank. Kimi's, and those that are made like it.

A file has no pattern and no special tokens. The pattern stands in the tokenizer's Python code, of which the strings of
`pat_str` are read, and nothing is run; special tokens stand in tokenizer_config.json.
"""

import ast
import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.vocabularies._made import (
    MAX_TOKEN_NBYTES,
    MAX_TOKENS,
    REMEDY,
    Made,
    add_special,
    byte_pieces,
    numbered,
    with_code_left_out,
)
from noria.errors import InputError, require
from noria.tools.text import plural

NAMES = ("tiktoken.model", "tokenizer.model")
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(?:\n|\Z)")
_MAX_CODE_NBYTES = 1 << 20
_MOST_SPECIAL = 1 << 16  # ids after the last rank
# Moonshot's class, where the directory was copied without its code: words of Han are apart from those of other letters.
_KNOWN = {
    "TikTokenTokenizer": "|".join(
        (
            r"[\p{Han}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )
}


def has(content: bytes) -> bool:
    return _LINE.match(content) is not None


def made(directory: Directory, name: str, settings: Mapping[str, Any]) -> Made:
    """Raises InputError for a damaged file, for a pattern that is not found, and without special tokens."""
    where = str(directory.path / name)
    tokens = _tokens(where, directory.content(name) or b"")
    pattern, source = _pattern(directory, where, settings)
    backend = byte_pieces(where, tokens, pattern, 0, {})
    add_special(where, backend, _special(where, len(tokens), settings))
    words = f"{plural(len(tokens), 'token')}, words by the pattern of {source}"
    return Made(backend.to_str().encode(), with_code_left_out(settings), words)


def _tokens(where: str, content: bytes) -> list[bytes]:
    """Tokens by rank."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            place = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{where}: line {number} is no token in base64 and rank: download it again") from error
        right = 0 < len(token) <= MAX_TOKEN_NBYTES and place not in found and len(found) < MAX_TOKENS
        require(right, f"{where}: line {number}: a token of {len(token)} bytes and rank {place} cannot be: {REMEDY}")
        found[place] = token
    whole = sorted(found) == list(range(len(found)))
    require(whole, f"{where}: its ranks are not 0 to {len(found) - 1}, each once: {REMEDY}")
    return [token for _, token in sorted(found.items())]


def _special(where: str, count: int, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Those of added_tokens_decoder, and names for the ids between them, which Moonshot's code gives them."""
    tree = settings.get("added_tokens_decoder")
    require(
        tree, f"{where}: tokenizer_config.json has no added_tokens_decoder, which names its special tokens: {REMEDY}"
    )
    tokens = dict(numbered(where, tree))
    for token_id, token in tokens.items():
        right = count <= token_id < count + _MOST_SPECIAL
        require(
            right,
            f"{where}: added_tokens_decoder gives {token.content[:40]!r} the id {token_id}, but ids of special tokens begin"
            f" at {count}: {REMEDY}",
        )
    reserved = (token_id for token_id in range(count, max(tokens)) if token_id not in tokens)
    return tokens | {
        number: AddedToken(f"<|reserved_token_{number}|>", normalized=False, special=True) for number in reserved
    }


def _pattern(directory: Directory, where: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The pattern of words, and where it was found."""
    its_map = settings.get("auto_map")
    named = its_map.get("AutoTokenizer") if isinstance(its_map, dict) else its_map
    named = next((one for one in named if isinstance(one, str)), "") if isinstance(named, list) else named
    module, _, class_name = (named if isinstance(named, str) else "").rpartition("--")[2].rpartition(".")
    class_name = class_name or str(settings.get("tokenizer_class"))
    code = directory.content(f"{module}.py") if re.fullmatch(r"\w+", module) else None
    if code is not None:
        return _written_pattern(str(directory.path / f"{module}.py"), code, class_name), f"{module}.py"
    require(
        class_name in _KNOWN,
        f"{where}: its words are cut by a pattern that stands in the code of its class ({class_name[:40]}), of which the"
        f" directory has no file: download that beside it (it is read, and not run), or {REMEDY}",
    )
    return _KNOWN[class_name], class_name


def _written_pattern(where: str, code: bytes, class_name: str) -> str:
    """The strings of `pat_str` in a class of Python code, which is not run. Raises InputError."""
    require(
        len(code) <= _MAX_CODE_NBYTES, f"{where} has {len(code)} bytes, at most {_MAX_CODE_NBYTES} are read: {REMEDY}"
    )
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where} is not Python ({str(error)[:80]}): {REMEDY}") from error
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    for node in (node for one in classes for node in one.body):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "pat_str" for target in targets):
            text = _text(node.value)  # type: ignore[attr-defined]
            if text is not None:
                return text
    raise InputError(f"{where}: {class_name} has no pat_str that is written out: {REMEDY}")


def _text(node: ast.expr | None) -> str | None:
    """A string that is written out, or several joined by one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "join"
        and len(node.args) == 1
    ):
        parts = node.args[0]
        texts = [_text(part) for part in parts.elts] if isinstance(parts, ast.List | ast.Tuple) else [None]
        between = _text(node.func.value)
        return None if between is None or None in texts else between.join(text for text in texts if text is not None)
    return None
