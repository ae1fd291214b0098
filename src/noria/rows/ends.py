"""When a sequence ends: by its tokens, or by a text in what they say. Knows neither devices nor steps."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from noria.rows.decoding import CUT, Writer, common_length
from noria.sampling import Sampling

_MOST_CUT = 8  # tokens: a character of UTF-8 is 4 bytes at most, so that longer ones never become whole
_LEAST_WINDOW = 8  # tokens with a text that are decoded before new ones: as many as decoding.Writer takes of a prompt


def finish_reason(
    token_ids: Sequence[int], sampling: Sampling, end_token_ids: Container[int], prompt_length: int, max_positions: int
) -> str:
    """Why a sequence with these generated tokens ends: `stop`, `length`, or `none` while it goes on.

    `stop`: the last token is an end token or one of stop_token_ids, and it stays in `token_ids`; `length`:
    max_new_tokens are generated, or prompt and generated tokens together fill the model's max_positions. An end token
    in the last place is a `stop`. Before min_new_tokens none of these tokens is sampled.
    """
    if sampling.most_new_tokens == 0:
        return "length"
    if not token_ids:
        return "none"
    if ends(token_ids[-1], sampling, end_token_ids):
        return "stop"
    full = len(token_ids) >= sampling.most_new_tokens or prompt_length + len(token_ids) >= max_positions
    return "length" if full else "none"


def ends(token_id: int, sampling: Sampling, end_token_ids: Container[int]) -> bool:
    """Whether this token ends a sequence."""
    return (not sampling.ignore_eos and token_id in end_token_ids) or token_id in sampling.stop_ids


def with_special_stops(sampling: Sampling, special_ids: Mapping[str, int]) -> Sampling:
    """The settings with stop texts that are special tokens (by their text in `special_ids`) as stop_token_ids."""
    special = [text for text in sampling.stop_texts if text in special_ids]
    if not special:
        return sampling
    ids = [*(sampling.stop_token_ids or []), *(special_ids[text] for text in special)]
    return replace(sampling, stop=[text for text in sampling.stop_texts if text not in special], stop_token_ids=ids)


class StopTexts:
    """Finds the first of sampling's stop texts in what a sequence's tokens say after its prompt, as the sequence grows.

    Only the last tokens are decoded anew, from a border of characters on, with a few before them (see decoding.Writer).
    A character that is not whole yet, which is decoded as U+FFFD, is no text until it is whole or cannot become so. A
    text that ends within the first min_new_tokens - 1 tokens does not count. Of texts that begin at one place the first
    in the list is meant.
    """

    def __init__(self, sampling: Sampling, writer: Writer, prompt_token_ids: Sequence[int] = ()):
        self._texts, self._least = sampling.stop_texts, sampling.min_new_tokens
        self._include = sampling.include_stop_str_in_output
        self._keep = max(map(len, self._texts)) - 1
        self._writer, self._prompt = writer, prompt_token_ids
        self._window = writer.context(prompt_token_ids)  # the last tokens that have a text
        self._before = writer.decode(self._window)  # what was read of it
        self._border = 0 if self._before.endswith(CUT) else len(self._window)  # where a window may begin later
        self._read = 0  # tokens of the sequence that were looked at
        self._tail, self._open = "", 0  # the last characters read; tokens since a character was begun

    def find(self, token_ids: Sequence[int]) -> int | None:
        """To be asked after every new token: the length of the text up to the first stop text, or None without one."""
        new = [token_id for token_id in token_ids[self._read :] if self._writer.piece(token_id) is not None]
        self._read = len(token_ids)
        self._window += new
        text = self._writer.decode(self._window)
        self._open = (self._open and self._open + len(new)) or 1 if text.endswith(CUT) else 0
        settled = self._open == 0 or self._open >= _MOST_CUT
        seen = self._tail + _beyond(self._before, text if settled else text.rstrip(CUT))
        if settled:
            self._tail = seen[max(0, len(seen) - self._keep) :]
            self._take(text)
        if len(token_ids) < self._least or not any(stop in seen for stop in self._texts):
            return None
        return self.place(token_ids, settled)

    def place(self, token_ids: Sequence[int], settled: bool = True) -> int | None:
        """Where the text of all these tokens is cut: before the first stop text, or after it; None without one.

        Unless it is `settled`, the last character is not whole yet.
        """
        text = self._writer.continuation(self._prompt, token_ids)
        text = text if settled else text.rstrip(CUT)
        early = token_ids[: self._least - 1] if self._least > 1 else ()
        end = len(self._writer.continuation(self._prompt, early))
        places = [(text.find(stop, max(0, end - len(stop) + 1)), stop) for stop in self._texts]
        found = min((one for one in places if one[0] >= 0), key=lambda one: one[0], default=None)
        return found and found[0] + self._include * len(found[1])

    def _take(self, text: str) -> None:
        """All of the window is read. It begins later from now on if there is enough of it after its border."""
        self._before = text
        later = self._window[self._border :]
        if len(later) >= _LEAST_WINDOW:
            self._window, self._border = later, len(later)
            self._before = self._writer.decode(later)


def _beyond(before: str, text: str) -> str:
    """What a text says after what was read of it before, of which a cut character may have become whole."""
    return text[len(before) if text.startswith(before) else common_length(before, text) :]
