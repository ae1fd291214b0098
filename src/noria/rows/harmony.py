"""Harmony, in which gpt-oss answers: messages of a header and a body, in channels. `analysis` is its thinking, `final` its
answer.

A message of `commentary` is kept in the text, in front of the answer: its body, or all of it where it calls a tool. So is a
call in any other channel. Knows no template and no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from noria.rows.reasoning import Phase
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
MARKERS = [f"{CHANNEL}analysis{MESSAGE}", f"{START}assistant{CHANNEL}final{MESSAGE}"]
_LAST = ("<|return|>", "<|call|>")  # what ends the last message
_TAIL = 4096  # tokens of a prompt in which its last message begins
_MOST_HEADER = 32  # tokens of a header: what is longer is text


def is_spoken(added_tokens: Mapping[str, int]) -> bool:
    """Whether a tokenizer has the tokens of this format."""
    return all(text in added_tokens for text in (START, CHANNEL, MESSAGE, END))


class Words:
    """The tokens of the format, and how an answer is begun at once."""

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.added_ids
        self.start, self.channel, self.message = added[START], added[CHANNEL], added[MESSAGE]
        self.ends = {added[text] for text in (END, *_LAST) if text in added}
        self.closing = tuple(tokenizer.encode(END + MARKERS[1], add_special_tokens=False))
        self.tokenizer = tokenizer


@dataclass
class ChannelMessage:
    """Of the generated tokens: where its header, its body and what follows begin; a body that is None has not begun."""

    header: int
    channel: str = ""
    calls: bool = False
    body: int | None = None
    end: int | None = None


class Listener:
    """Messages of the tokens that a row generates, one after another.

    Begins where the prompt ends: within a header, or within a body where a message of the prompt goes on.
    """

    def __init__(self, words: Words, prompt_token_ids: Sequence[int]):
        self._words = words
        self._header: list[int] = []
        self.messages: list[ChannelMessage] = []
        self.is_open = False  # whether the prompt has begun a message
        tail = list(prompt_token_ids[-_TAIL:])
        if words.start in tail:
            begin = len(tail) - 1 - tail[::-1].index(words.start)
            for token_id in tail[begin:]:
                self.take(token_id, 0)
            self.is_open = not self.messages or self.messages[-1].end is None
            self.messages = [one for one in self.messages if one.end is None]
            if self.messages and self.last.body is not None:
                self.last.body = 0
        if not self.messages:
            self.messages.append(ChannelMessage(0))

    @property
    def last(self) -> ChannelMessage:
        return self.messages[-1]

    def take(self, token_id: int, place: int) -> None:
        """The token at this place among the generated ones."""
        words, inside = self._words, bool(self.messages) and self.last.body is not None
        if inside and self.last.end is None:
            if token_id in words.ends:
                self.last.end = place
            return
        if token_id == words.start or not self.messages or self.last.end is not None:
            if not self.messages or self.last.end is not None:
                self.messages.append(ChannelMessage(place))
            self._header = []
        if token_id == words.message:
            self._begin_body(place + 1)
        else:
            self._header.append(token_id)

    def _begin_body(self, place: int) -> None:
        header = self._words.tokenizer.decode(self._header, skip_special_tokens=False)
        channel = header.partition(CHANNEL)[2].split()
        self.last.channel, self.last.calls = (channel[0] if channel else ""), " to=" in header
        self.last.body, self._header = place, []


class Channels:
    """The channels of one row, as its tokens come; what it has is what Reasoning has (reasoning.py)."""

    def __init__(self, words: Words, sampling: Sampling, prompt_token_ids: Sequence[int]):
        self._words, self._prompt = words, list(prompt_token_ids)
        self._budget = sampling.thinking_token_budget
        self._writer = words.tokenizer.writer(sampling.skip_special_tokens)
        self._parser = Listener(words, self._prompt)
        self._closing: int | None = None  # where the budget begins to close the thinking
        self.phase = Phase.BEFORE
        self.begin: int | None = None
        self.answer: int | None = None
        if self._parser.last.body is not None:
            self._begin_message(0)

    @property
    def start_token(self) -> int | None:
        """The token that begins a channel."""
        return self._words.channel

    def decline(self) -> None:
        """The row has no channels: what it says is its answer."""
        self.phase, self.answer = Phase.AFTER, 0

    def add(self, token_ids: Sequence[int]) -> None:
        """To be told after every new token: all of the row's."""
        place, token_id = len(token_ids) - 1, token_ids[-1]
        self._parser.take(token_id, place)
        message = self._parser.last
        if self.phase is Phase.BEFORE and token_id in (self._words.channel, self._words.start):
            self.phase = Phase.INSIDE
        elif self.phase is Phase.BEFORE and message.body is None and self._is_text(place + 1):
            self.decline()
        elif message.body == place + 1:
            self._begin_message(place + 1)
        if self._closing is None and self._budget is not None and self.begin is not None:
            inside = message.body is not None and message.end is None
            if inside and place + 1 >= self.begin + self._budget:
                self._closing = place + 1

    def _is_text(self, length: int) -> bool:
        """Whether tokens before any of the format's own are no header."""
        return not self._parser.is_open or length > _MOST_HEADER

    def _begin_message(self, place: int) -> None:
        message = self._parser.last
        if message.channel == "final" and not message.calls:
            self.phase, self.answer = Phase.AFTER, place
            return
        self.phase = Phase.INSIDE
        if self.begin is None and _thinks(message):
            self.begin = place

    def forced(self, num_tokens: int) -> int | None:
        """The next token, where the budget says it: of what ends the thinking and begins the answer."""
        if self._closing is None:
            return None
        place = num_tokens - self._closing
        return self._words.closing[place] if 0 <= place < len(self._words.closing) else None

    def num_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of the thinking, without headers."""
        return sum(len(self._body(one, token_ids)) for one in self._messages(token_ids) if _thinks(one))

    def split(self, token_ids: Sequence[int], text_end: int | None) -> tuple[str, str]:
        """The reasoning and the text of these tokens; `text_end`: characters of the answer up to the stop text.

        Several messages are joined by a line's end. Whitespace around the reasoning, and before the answer, belongs to
        neither.
        """
        if self.phase is Phase.BEFORE or (self.answer == 0 and self.begin is None):
            return "", self._written(0, token_ids, token_ids)[:text_end]
        thought: list[str] = []
        said: list[str] = []
        for one in self._messages(token_ids):
            if one.calls:
                said.append(self._call(one, token_ids))
            elif one.body is not None and one.body == self.answer:
                said.append(self._written(one.body, token_ids[one.body :], token_ids)[:text_end])
            elif one.body is not None:
                written = self._written(one.body, self._body(one, token_ids), token_ids).strip()
                (thought if _thinks(one) else said).append(written)
        return "\n".join(filter(None, thought)), "\n".join(filter(None, said)).lstrip()

    def _messages(self, token_ids: Sequence[int]) -> list[ChannelMessage]:
        """Those up to the answer, whose body is all that follows."""
        parser = Listener(self._words, self._prompt)
        for place, token_id in enumerate(token_ids[: self.answer]):
            parser.take(token_id, place)
        return parser.messages

    def _body(self, message: ChannelMessage, token_ids: Sequence[int]) -> Sequence[int]:
        return [] if message.body is None else token_ids[message.body : message.end]

    def _written(self, place: int, part: Sequence[int], token_ids: Sequence[int]) -> str:
        return self._writer.continuation([*self._prompt, *token_ids[:place]], part)

    def _call(self, message: ChannelMessage, token_ids: Sequence[int]) -> str:
        """A call as it stands, from its channel on."""
        whole = token_ids[message.header : message.end]
        text = self._words.tokenizer.decode(whole, skip_special_tokens=False)
        return text.removeprefix(START).removeprefix("assistant")


def _thinks(message: ChannelMessage) -> bool:
    return message.channel == "analysis" and not message.calls
