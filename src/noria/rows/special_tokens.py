"""What the settings of a tokenizer say of its tokens: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

They count as transformers 5 has it (PreTrainedTokenizerBase.from_pretrained). Knows no pipeline and no model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken

from noria.errors import InputError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


@dataclass
class Settings:
    """`keys`: all that is no token; `named`: tokens by name, None where it is said that there is none; `extra`: special
    tokens without a name, None where nothing is said of them; `added`: by id, tokens that are matched before a text is
    cut into words, with their flags.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    named: dict[str, Token | None] = field(default_factory=dict)
    extra: list[Token] | None = None
    added: dict[int, AddedToken] = field(default_factory=dict)


def read_settings(files: Mapping[str, bytes], tree: Mapping[str, Any]) -> Settings:
    """The settings among a tokenizer's files; `tree` is tokenizer.json's. Raises InputError for a damaged file.

    special_tokens_map.json and added_tokens.json are read only where tokenizer_config.json has no added_tokens_decoder;
    then the former wins. Beside a tokenizer.json nothing is said of whether BOS or EOS are added: that file has it.
    """
    keys = json_object(files, "tokenizer_config.json")
    if "tokenizer.json" in files:
        keys = {name: value for name, value in keys.items() if name not in ("add_bos_token", "add_eos_token")}
    if "additional_special_tokens" in keys and not keys.get("extra_special_tokens"):
        keys["extra_special_tokens"] = keys.pop("additional_special_tokens")
    # Texts beside the known names come after all others, which decides over the ids of tokens that are new.
    last = {name: keys.pop(name) for name in list(keys) if _is_name(name) and isinstance(keys[name], str)}
    last |= _pop_table(keys)
    decoder = keys.pop("added_tokens_decoder", None)
    if decoder is not None:
        added = {int(token_id): _token(token) for token_id, token in decoder.items()}
    else:
        _merge(keys, json_object(files, "special_tokens_map.json"))
        last |= _pop_table(keys)
        added = _older_added_tokens(files, tree, keys)
    if "additional_special_tokens" in keys and "extra_special_tokens" not in keys:
        keys["extra_special_tokens"] = keys.pop("additional_special_tokens")
    return _sorted(keys, last, added)


def _sorted(keys: dict[str, Any], last: dict[str, Any], added: dict[int, AddedToken]) -> Settings:
    by_text = {token.content: token for token in added.values()}
    more = [name for name in keys if _is_name(name) and isinstance(keys[name], Token | dict | None)]
    named = {}
    for name in NAMES:
        if name in keys:
            token = _named(name, keys.pop(name))
            named[name] = by_text.get(str(token), token)
    named |= {name: _named(name, keys.pop(name)) for name in more}
    named |= {name: _named(name, token) for name, token in last.items()}
    extra = keys.pop("extra_special_tokens", None)
    if extra is not None:
        extra = [_named("extra_special_tokens", token) for token in extra]
    return Settings(keys, named, extra, added)


def _is_name(name: str) -> bool:
    return name.endswith("_token") and name not in NAMES


def _pop_table(keys: dict[str, Any]) -> dict[str, Any]:
    """extra_special_tokens where they have names."""
    return keys.pop("extra_special_tokens") if isinstance(keys.get("extra_special_tokens"), dict) else {}


def _merge(keys: dict[str, Any], mapped: dict[str, Any]) -> None:
    """Lets special_tokens_map.json override the keys; its tokens are special."""
    for name, value in mapped.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            value = [_special(token) for token in value]
            known = keys.get(name) or []
            value = [*known, *(token for token in value if token not in known)]
        elif isinstance(value, dict) and name != "extra_special_tokens":
            value = _special(value)
        keys[name] = value


def _older_added_tokens(
    files: Mapping[str, bytes], tree: Mapping[str, Any], keys: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """From added_tokens.json, which has no flags, and from tokenizer.json, whose own win."""
    special = {str(_named(name, keys[name])) for name in NAMES if keys.get(name)}
    special |= {str(_named("extra_special_tokens", token)) for token in keys.get("extra_special_tokens") or ()}
    added = {}
    for text, token_id in json_object(files, "added_tokens.json").items():
        added[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
    for token in tree.get("added_tokens") or ():
        added[token["id"]] = _token(token)
    return added


def _named(name: str, token: Any) -> Token | None:
    """A token as settings have it: a text, or an object with its `content`."""
    if token is None or isinstance(token, str | AddedToken):
        return token
    if isinstance(token, dict) and isinstance(token.get("content"), str):
        return _token(token)
    raise InputError(f"tokenizer_config.json: {name} is {str(token)[:60]}: it must be a text")


def _special(token: Any) -> Token:
    return _token(token | {"special": True}) if isinstance(token, dict) else token


def _token(token: Mapping[str, Any]) -> AddedToken:
    return AddedToken(token["content"], **{name: token[name] for name in _FLAGS if token.get(name) is not None})


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in one of the files; {} where there is none. Raises InputError for anything else."""
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON ({str(error)[:200]}): download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{name} is not a JSON object: download it again")
    return value
