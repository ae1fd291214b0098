"""Text to token ids and back, as the model's own tokenizer does it, and the tokens that end a text.

Equal to transformers' `tokenizer(text).input_ids`. Reads bytes, not files; knows no rows and no model weights.
"""

import threading
from collections.abc import Container, Iterable, Mapping
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from tokenizers import Encoding

from noria.errors import InputError
from noria.model import OpenModel
from noria.rows.decoding import Writer, spelled
from noria.rows.pretrained import REMEDY, pretrained

SECONDS = 60.0  # that a text may take, and CHARACTERS_PER_SECOND more: far more than an honest tokenizer needs
CHARACTERS_PER_SECOND = 20_000
_SHORT = 200  # characters: the regular expressions of tokenizers give up on them within half a minute
_MOST_STUCK = 3  # texts, each of which keeps a thread busy for ever


def tokenizer_of(checkpoint: OpenModel) -> "Tokenizer":
    """The tokenizer of a checkpoint. Raises InputError for a damaged file."""
    return Tokenizer(checkpoint.tokenizer, checkpoint.config, checkpoint.generation_config)


class Tokenizer:
    """The tokenizer of a checkpoint, as transformers' AutoTokenizer makes it of the same files.

    `files` are its files by name: see files.checkpoint. Without a tokenizer `vocab_size` is 0: rows of token_ids can be
    run, text cannot. `config` and `generation_config` are the model's; `end_token_ids` are the tokens that end a text by
    any of the three; `special_tokens` are those with a name (bos_token, ...) by it, which chat templates read. Raises
    InputError for a damaged file and for a tokenizer that Noria has no rules for.
    """

    def __init__(self, files: Mapping[str, bytes], config: Mapping[str, Any], generation_config: Mapping[str, Any]):
        made = pretrained(files, config)
        self.special_tokens = made.named if made else {}
        self._backend = made.backend if made else None
        self._cleans_up = bool(made and made.cleans_up)
        self._num_stuck = 0
        self.vocab_size = self._backend.get_vocab_size() if self._backend else 0
        text: Any = config.get("text_config")  # of a model with images
        named = generation_config, config, text if isinstance(text, Mapping) else {}
        ends = [token_id for its in named for token_id in _ids(its.get("eos_token_id"))]
        if self._backend:
            ends += _ids(self._backend.token_to_id(self.special_tokens.get("eos_token", "")))
        self.end_token_ids = frozenset(ends)
        self._special = frozenset(self.special_ids.values())
        self._is_byte_level = "ByteLevel" in str(self._backend.decoder if self._backend else None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, with the BOS that the post-processor adds unless the text begins with it.

        Without `add_special_tokens` the text alone, as of a conversation whose template wrote them. Lone surrogates,
        which are no text, become U+FFFD. Raises InputError if the checkpoint has no tokenizer, or one that cannot do it.
        """
        if self._backend is None:
            raise InputError(f"the checkpoint has no tokenizer.json: give token_ids, or {REMEDY}")
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

    def spelled(self, token_id: int) -> bytes | None:
        """The bytes of a token that stands alone, of half a character too; None for an id that the tokenizer does not have.

        A space before a word is its own. Where tokens of a text change each other's, this is not what `decode` makes of it.
        """
        piece = self._backend.id_to_token(int(token_id)) if self._backend else None
        if piece is None:
            return None
        return piece.encode() if token_id in self._special else spelled(piece, self._is_byte_level)

    @property
    def added_ids(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary, special or not, by their text: never in parts."""
        added = self._backend.get_added_tokens_decoder() if self._backend else {}
        return {token.content: token_id for token_id, token in added.items()}

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json; it has one."""
        assert self._backend is not None, "the checkpoint has no tokenizer"
        return self._backend.to_str()

    def writer(self, skip_special_tokens: bool = True) -> Writer:
        """How generated tokens are written after those of their prompt."""
        decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
        return Writer(decode, partial(self._piece, left_out=self._special if skip_special_tokens else ()))

    def _piece(self, token_id: int, left_out: Container[int]) -> str | None:
        if self._backend is None:
            return ""  # as none has a text, none need be looked for among thousands
        return None if token_id in left_out else self._backend.id_to_token(int(token_id))

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens that stand alone; a character that is cut becomes U+FFFD.

        Ids that the tokenizer does not have, as in a padded vocabulary, have no text. "" without a tokenizer. Raises
        InputError if the file's own rules cannot make a text of these tokens.
        """
        if self._backend is None:
            return ""
        ids = [int(token_id) for token_id in token_ids]
        try:
            text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
            return _cleaned_up(text) if self._cleans_up else text
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
            raise InputError(f"the tokenizer did not finish {_MOST_STUCK} texts: {REMEDY}")
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
        raise InputError("the prompt has no tokens: the tokenizer makes none from this text")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InputError(f"token id {wrong} is not in the model's vocabulary of {vocab_size}: check {whose}")
    return ids


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _cleaned_up(text: str) -> str:
    """Without the spaces that a tokenizer of words puts before marks (transformers' clean_up_tokenization)."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [token_id for token_id in values if isinstance(token_id, int) and not isinstance(token_id, bool)]


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
