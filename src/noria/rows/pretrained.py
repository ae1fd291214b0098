"""The tokenizer that transformers' AutoTokenizer makes of a directory's files. Knows no texts and no rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Backend

from noria.errors import InputError
from noria.rows.special_tokens import NAMES, Settings, Token, json_object, read_settings
from noria.rows.tokenizer_classes import TokenizerClass, class_of, post_processor, vocabulary

REMEDY = "save one with transformers (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)) and convert again"
_EVEN_FOR_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


@dataclass(frozen=True)
class Pretrained:
    """`backend` is the pipeline from text to ids and back, `named` the text of special tokens by name; `cleans_up`: spaces
    before marks are taken out of texts.
    """

    backend: Backend
    named: dict[str, str]
    cleans_up: bool


def pretrained(files: Mapping[str, bytes], config: Mapping[str, Any]) -> Pretrained | None:
    """The tokenizer of these files, by name, of a model with this config.json; None if they are none.

    Raises InputError for a damaged file, and for a tokenizer of which Noria does not have the rules.
    """
    try:
        tree = json_object(files, "tokenizer.json")
        settings = read_settings(files, tree)
        if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= set(files):
            return None
        kind = class_of(files, json_object(files, "tokenizer_config.json"), config)
        if "tokenizer.json" not in files and kind.build is None:
            return None
        return _made(files, tree, kind, settings, config)
    except InputError as error:
        raise InputError(f"the model's tokenizer: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics that are none
        said = " ".join(str(error).split())[:200]
        raise InputError(f"the model's tokenizer cannot be read ({said}): {REMEDY}") from error


def _made(
    files: Mapping[str, bytes],
    tree: Mapping[str, Any],
    kind: TokenizerClass,
    settings: Settings,
    config: Mapping[str, Any],
) -> Pretrained:
    keys, named = {**kind.defaults, **settings.keys}, _named(kind, settings, tree)
    extra = settings.extra
    if extra is None:
        extra = [kind.named[name] for name in kind.extra if settings.named.get(name, "") is not None]
    backend = _pipeline(files, tree, kind, keys, named)
    _check_keys(backend, keys, config)
    _add_tokens(backend, settings.added, list(named.values()), extra)
    if "add_bos_token" in keys or "add_eos_token" in keys or not kind.keeps_post_processor:
        _add_begin_and_end(backend, keys, named)
    if kind.adds_all:
        backend.add_tokens([AddedToken(str(token), special=True) for token in [*named.values(), *extra]])
    texts = {name: str(token) for name, token in named.items()}
    return Pretrained(backend, texts, _cleans_up(backend, keys))


def _pipeline(
    files: Mapping[str, bytes],
    tree: Mapping[str, Any],
    kind: TokenizerClass,
    keys: Mapping[str, Any],
    named: Mapping[str, Token],
) -> Backend:
    """The class's own, or that of tokenizer.json, whose tree is given; without its truncation and padding."""
    if kind.build is None:
        backend = Backend.from_str(files["tokenizer.json"].decode())
    else:
        unknown = named.get("unk_token")
        backend = kind.build(*vocabulary(files, tree), {**keys, "unk_token": None if unknown is None else str(unknown)})
        if tree and (processor := post_processor(files["tokenizer.json"], tree)) is not None:
            backend.post_processor = processor
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(keys.get("split_special_tokens", False))
    return backend


def _cleans_up(backend: Backend, keys: Mapping[str, Any]) -> bool:
    """Whether spaces before marks are taken out: for BPE, which has its own, only where that is asked for twice."""
    asked = bool(keys.get("clean_up_tokenization_spaces"))
    return asked and (not isinstance(backend.model, models.BPE) or bool(keys.get(_EVEN_FOR_BPE)))


def _named(kind: TokenizerClass, settings: Settings, tree: Mapping[str, Any]) -> dict[str, Token]:
    """The class's tokens and those of the settings by name, in the order in which new ones get ids."""
    padding = tree.get("padding") or {}
    given = {"pad_token": padding["pad_token"]} if "pad_token" in padding else {}
    named = {**kind.named, **given, **settings.named}
    return {name: named[name] for name in sorted(named, key=_place) if named[name] is not None}


def _place(name: str) -> int:
    return NAMES.index(name) if name in NAMES else len(NAMES)


def _add_tokens(backend: Backend, added: Mapping[int, AddedToken], named: list[Token], extra: list[Token]) -> None:
    """Adds the tokens of the settings, with their flags, and those that they name and nobody has yet."""
    given = [token for _, token in sorted(added.items())]
    texts = {token.content for token in [*backend.get_added_tokens_decoder().values(), *given]}
    # A text that is named twice is added twice: the flags of the last one hold.
    new = [*given, *(token for token in dict.fromkeys([*named, *extra]) if str(token) not in texts)]
    names = {str(token) for token in named}
    tokens = []
    for token in new:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif not token.special and str(token) in names:
            token.special = True
        tokens.append(token)
    backend.add_tokens(tokens)


def _add_begin_and_end(backend: Backend, keys: Mapping[str, Any], named: Mapping[str, Token]) -> None:
    """Puts BOS and EOS around every text, as the settings ask for, in place of what tokenizer.json puts there."""
    begin = str(named["bos_token"]) if keys.get("add_bos_token") and "bos_token" in named else None
    end = str(named["eos_token"]) if keys.get("add_eos_token") and "eos_token" in named else None
    pieces = [begin, "$A", end]
    ids = [(text, backend.token_to_id(text)) for text in (begin, end) if text is not None]
    single = [piece for piece in pieces if piece is not None]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _check_keys(backend: Backend, keys: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses what transformers honours and Noria does not."""
    files = keys.get("fast_tokenizer_files") or ["tokenizer.json"]
    if files != ["tokenizer.json"]:
        raise InputError(
            f"tokenizer_config.json has fast_tokenizer_files {', '.join(map(str, files))[:80]}: give the right one as"
            " tokenizer.json and remove that key"
        )
    if keys.get("fix_mistral_regex") and backend.get_vocab_size() > 100_000 and config.get("model_type") == "mistral":
        raise InputError(
            "tokenizer_config.json has fix_mistral_regex, which this version of Noria does not have: save the tokenizer with"
            " transformers 5, which writes it into tokenizer.json, and remove that key"
        )
