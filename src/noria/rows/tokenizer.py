"""Text to token ids and back, as the model's own tokenizer does it, and the tokens that end a text.

Equal to transformers' `tokenizer(text).input_ids`. Reads bytes, not files; knows no rows and no model weights.
"""

import json
import threading
from collections.abc import Container, Iterable, Mapping
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from tokenizers import AddedToken, Encoding, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from noria.config import InputError
from noria.files.checkpoint import OpenModel
from noria.rows.decoding import Writer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_NAMED = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
SECONDS = 60.0  # that a text may take, and CHARACTERS_PER_SECOND more: far more than an honest tokenizer needs
CHARACTERS_PER_SECOND = 20_000
_SHORT = 200  # characters: the regular expressions of tokenizers give up on them within half a minute
_MOST_STUCK = 3  # texts, each of which keeps a thread busy for ever
_REMEDY = "save one with transformers (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)) and convert again"


def tokenizer_of(checkpoint: OpenModel) -> "Tokenizer":
    """The tokenizer of a checkpoint. Raises InputError for a damaged file."""
    return Tokenizer(checkpoint.tokenizer, checkpoint.config, checkpoint.generation_config)


class Tokenizer:
    """The tokenizer of a checkpoint.

    `files` are its files by name: tokenizer.json, or vocab.json and merges.txt of a byte-level BPE (GPT-2, OPT); and
    their settings: tokenizer_config.json, special_tokens_map.json, added_tokens.json. Without a tokenizer `vocab_size`
    is 0: rows of token_ids can be run, text cannot. `config` and `generation_config` are the model's; `end_token_ids`
    are the tokens that end a text by any of the three. Raises InputError for a damaged file.
    """

    def __init__(self, files: Mapping[str, bytes], config: Mapping[str, Any], generation_config: Mapping[str, Any]):
        settings = _json_file(files, "special_tokens_map.json") | _json_file(files, "tokenizer_config.json")
        named = {name: text for name in _NAMED if (text := _text(settings.get(name)))}
        if "tokenizer.json" not in files:
            named = _GPT2_NAMED | named
        self.special_tokens = named  # name (bos_token, eos_token, ...) -> text
        self._backend = _backend(files, settings, named)
        self._num_stuck = 0
        self.vocab_size = self._backend.get_vocab_size() if self._backend else 0
        ends = [*_ids(generation_config.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
        if self._backend:
            ends += _ids(self._backend.token_to_id(named.get("eos_token", "")))
        self.end_token_ids = frozenset(ends)
        self._special = frozenset(self.special_ids.values())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, with the BOS that the post-processor adds unless the text begins with it.

        Without `add_special_tokens` the text alone, as of a conversation whose template wrote them. Lone surrogates,
        which are no text, become U+FFFD. Raises InputError if the checkpoint has no tokenizer, or one that cannot do it.
        """
        if self._backend is None:
            raise InputError(f"the checkpoint has no tokenizer.json: give token_ids, or {_REMEDY}")
        encoding = self._encoded(_without_lone_surrogates(text), add_special_tokens)
        if not add_special_tokens:
            return encoding.ids
        ids, added = encoding.ids, encoding.special_tokens_mask
        prefix = added.index(0) if 0 in added else len(ids)
        doubled = ids[:prefix] == ids[prefix : 2 * prefix]
        return ids[prefix:] if doubled else ids

    @property
    def special_ids(self) -> dict[str, int]:
        """The special tokens by their text: what decode leaves out."""
        added = self._backend.get_added_tokens_decoder() if self._backend else {}
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def writer(self, skip_special_tokens: bool = True) -> Writer:
        """How generated tokens are written after those of their prompt."""
        decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
        return Writer(decode, partial(self._piece, left_out=self._special if skip_special_tokens else ()))

    def _piece(self, token_id: int, left_out: Container[int]) -> str | None:
        if self._backend is None or token_id in left_out:
            return None
        return self._backend.id_to_token(int(token_id))

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens that stand alone; a character that is cut becomes U+FFFD.

        Ids that the tokenizer does not have, as in a padded vocabulary, have no text. "" without a tokenizer. Raises
        InputError if the file's own rules cannot make a text of these tokens.
        """
        if self._backend is None:
            return ""
        ids = [int(token_id) for token_id in token_ids]
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            raise InputError(f"the tokenizer cannot write these tokens ({_one_line(error)})") from error

    def _encoded(self, text: str, add_special_tokens: bool) -> Encoding:
        """What the file's own rules make of a text, in bounded time: its regular expressions may never come to an end.

        Nothing can stop one, so a thread is left alone with it.
        """
        answers: SimpleQueue[Any] = SimpleQueue()
        backend = self._backend
        assert backend is not None, "text needs a tokenizer"

        def work() -> None:
            try:  # of one text, because other threads go on meanwhile, as they do not with `encode`
                answers.put(backend.encode_batch([text], add_special_tokens=add_special_tokens)[0])
            except BaseException as error:  # noqa: BLE001 - a Rust panic is no Exception
                answers.put(error)

        limit = SECONDS + len(text) / CHARACTERS_PER_SECOND
        if self._num_stuck >= _MOST_STUCK:
            raise InputError(f"the tokenizer did not come to an end with {_MOST_STUCK} texts: {_REMEDY}")
        if len(text) <= _SHORT:
            work()
        else:
            threading.Thread(target=work, daemon=True).start()
        try:
            answer = answers.get(timeout=limit)
        except Empty:
            self._num_stuck += 1
            raise InputError(
                f"the tokenizer took more than {limit:.0f} s with a text of {len(text)} characters"
            ) from None
        if isinstance(answer, KeyboardInterrupt | SystemExit):
            raise answer
        if isinstance(answer, BaseException):
            raise InputError(f"the tokenizer cannot read this text ({_one_line(answer)})") from answer
        return answer


def prompt_token_ids(tokenizer: Tokenizer, prompt: str, token_ids: list[int] | None, vocab_size: int) -> list[int]:
    """What a row feeds the model: its `token_ids` exactly as they are, else its `prompt` encoded.

    Raises InputError for a prompt without tokens and for ids outside the model's vocabulary of `vocab_size`.
    """
    if token_ids is not None:
        return checked_ids(token_ids, vocab_size, "token_ids")
    return checked_ids(tokenizer.encode(prompt), vocab_size, "the tokenizer's ids")


def checked_ids(ids: list[int], vocab_size: int, whose: str) -> list[int]:
    """The ids, if there are any and the model has them all. Raises InputError that says whose they are."""
    if not ids:
        raise InputError("the prompt has no tokens: the tokenizer makes none of this text")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InputError(f"token id {wrong} is not in the model's vocabulary of {vocab_size}: check {whose}")
    return ids


def _backend(files: Mapping[str, bytes], settings: Mapping[str, Any], named: Mapping[str, str]) -> Backend | None:
    try:
        if "tokenizer.json" in files:
            # transformers too takes add_bos_token from the post-processor of this file, whatever the settings say.
            backend = Backend.from_str(files["tokenizer.json"].decode())
        elif "vocab.json" in files and "merges.txt" in files:
            backend = _byte_level_bpe(files, settings, named)
        else:
            return None
    except InputError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics that are none
        raise InputError(f"the checkpoint's tokenizer cannot be read ({error}): {_REMEDY}") from error
    backend.no_truncation()
    backend.no_padding()
    _mark_special(backend, named)
    return backend


def _byte_level_bpe(files: Mapping[str, bytes], settings: Mapping[str, Any], named: Mapping[str, str]) -> Backend:
    """The tokenizer of GPT-2 and OPT from its original files (transformers' GPT2Tokenizer)."""
    lines = files["merges.txt"].decode().split("\n")
    merges: Any = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]  # it checks them
    backend = Backend(models.BPE(vocab=_json_file(files, "vocab.json"), merges=merges, fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    for token_id, token in sorted(_added_tokens(files, settings).items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise InputError(f"the checkpoint's tokenizer has no place {token_id} for {token.content!r}: {_REMEDY}")
    bos = named["bos_token"]
    bos_id = backend.token_to_id(bos)
    if settings.get("add_bos_token") and bos_id is not None:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return backend


def _added_tokens(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary, by id: from tokenizer_config.json, or from added_tokens.json where it has none."""
    if decoder := settings.get("added_tokens_decoder"):
        return {int(token_id): AddedToken(**token) for token_id, token in decoder.items()}
    added = _json_file(files, "added_tokens.json")
    return {token_id: AddedToken(text, normalized=True) for text, token_id in added.items()}


def _mark_special(backend: Backend, named: Mapping[str, str]) -> None:
    """The tokens that the settings name are special even where tokenizer.json does not say so; the vocabulary stays."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for text in named.values():
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"the checkpoint's {name} is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(value, dict):
        raise InputError(f"the checkpoint's {name} is not a JSON object: {_REMEDY}")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _text(token: Any) -> str | None:
    """The text of a token as settings have it: a string, or an object with its `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [token_id for token_id in values if isinstance(token_id, int) and not isinstance(token_id, bool)]


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
