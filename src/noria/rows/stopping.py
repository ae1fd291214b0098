"""When a sequence ends: by its tokens, or by a text in what they say. Knows neither devices nor steps."""

from collections.abc import Callable, Container, Sequence

from noria.config import Sampling

_CUT = "\N{REPLACEMENT CHARACTER}"  # how a character that is not whole yet is decoded
_MOST_CUT = 8  # tokens: a character of UTF-8 is 4 bytes at most, so that longer ones never become whole


def finish_reason(
    token_ids: Sequence[int], sampling: Sampling, end_token_ids: Container[int], prompt_length: int, max_positions: int
) -> str:
    """Why a sequence with these generated tokens ends: `stop`, `length`, or `none` while it goes on.

    `stop`: the last token is an end token or one of stop_token_ids, and it stays in `token_ids`; `length`:
    max_new_tokens are generated, or prompt and generated tokens together fill the model's max_positions. An end token
    in the last place is a `stop`. Before min_new_tokens none of these tokens is sampled.
    """
    if sampling.max_new_tokens == 0:
        return "length"
    if not token_ids:
        return "none"
    last = token_ids[-1]
    if (not sampling.ignore_eos and last in end_token_ids) or last in (sampling.stop_token_ids or ()):
        return "stop"
    full = len(token_ids) >= sampling.max_new_tokens or prompt_length + len(token_ids) >= max_positions
    return "length" if full else "none"


class StopTexts:
    """Finds the first of some texts in what a sequence's tokens say, as the sequence grows.

    `decode` gives the text of token ids. Each token is decoded with the few before it, because what a token says may
    depend on them: a character may be cut between byte-level tokens, and a first word has no space before it. A text
    that ends within the first min_new_tokens - 1 tokens does not count.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str], min_new_tokens: int = 0):
        self._texts, self._decode, self._least = texts, decode, min_new_tokens
        self._keep = max(map(len, texts)) - 1
        self._first = self._read = 0  # tokens first .. read are decoded, but only what follows them is new text
        self._before = ""
        self._tail = ""

    def find(self, token_ids: Sequence[int]) -> int | None:
        """To be asked after every new token: the length of the text before the first stop text, or None without one."""
        text = self._decode(token_ids[self._first :])
        seen = self._tail + text[len(self._before) :]
        if not text.endswith(_CUT) or len(token_ids) - self._read >= _MOST_CUT:
            self._first, self._read = self._read, len(token_ids)
            self._before = self._decode(token_ids[self._first : self._read])
            self._tail = seen[max(0, len(seen) - self._keep) :]
        if len(token_ids) < self._least or not any(stop in seen for stop in self._texts):
            return None
        return self._place(token_ids)

    def _place(self, token_ids: Sequence[int]) -> int | None:
        """Where in the whole text the first stop text begins."""
        text = self._decode(token_ids)
        end = len(self._decode(token_ids[: self._least - 1])) if self._least > 1 else 0
        places = (text.find(stop, max(0, end - len(stop) + 1)) for stop in self._texts)
        return min((place for place in places if place >= 0), default=None)
