"""Where a row thinks: between two markers, of which the prompt may have the first. Its answer begins after the second.

A marker that the tokenizer has as a token of its own is that token, and else a text. A row thinks once, at its beginning:
markers that come later are text. Knows no template and no device.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from noria.errors import InputError
from noria.rows.ends import StopTexts
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling

# The markers that published models have, by their templates or as tokens of their own.
KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel>thought", "<channel|>"),
    ("<think:opensource>", "</think:opensource>"),
)
_TAIL = 4096  # tokens of a prompt that are looked at for an open marker
_MOST_BLANK = 16  # tokens of whitespace after which no thinking begins any more


def markers_of(templates: Iterable[str], added_tokens: Mapping[str, int]) -> list[str]:
    """The markers of a model: the first of KNOWN whose end its chat templates say, or that are both tokens of their own."""
    texts = list(templates)
    for start, end in KNOWN:
        if any(end in text for text in texts) or (start in added_tokens and end in added_tokens):
            return [start, end]
    return []


@dataclass(frozen=True)
class Marker:
    """`token`: its token id, where it is one of its own; `token_ids`: how the tokenizer writes it; `shown`: how a text has
    it where special tokens are left out."""

    text: str
    token: int | None
    token_ids: tuple[int, ...]
    shown: str


def _shown(text: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """A marker as texts have it; as it is given, where the tokenizer cannot write it: prompts and rows then say so."""
    try:
        return tokenizer.decode(token_ids).strip()
    except InputError:
        return text


class Markers:
    """The two markers of a run, and what the rows' prompts say of them."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer):
        added = tokenizer.added_ids
        ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        self.start, self.end = (
            Marker(text, added.get(text), its, _shown(text, its, tokenizer))
            for text, its in zip(texts, ids, strict=True)
        )
        self.tokenizer = tokenizer

    def opened(self, prompt_token_ids: Sequence[int], continued: bool = False) -> bool | None:
        """Whether a prompt has begun the thinking (True) or ended it (False); None: that is left to the model.

        It has where it ends with a marker. With `continued`, of a conversation whose last message goes on, where the last
        marker is that of the beginning.
        """
        text = self.tokenizer.decode(prompt_token_ids[-_TAIL:], skip_special_tokens=False).rstrip()
        if text.endswith(self.start.text):
            return True
        begun, ended = text.rfind(self.start.text), text.rfind(self.end.text)
        if text.endswith(self.end.text) or (continued and ended > begun):
            return False
        return True if continued and begun >= 0 else None


class Phase(Enum):
    """BEFORE: the model may still begin to think. INSIDE, AFTER."""

    BEFORE = 0
    INSIDE = 1
    AFTER = 2


class Reasoning:
    """The thinking of one row, as its tokens come.

    `begin`: tokens up to the thinking (None: there is none); `close`: tokens before its end marker; `answer`: tokens before
    the answer (None: it has not begun).
    """

    def __init__(self, markers: Markers, sampling: Sampling, prompt_token_ids: Sequence[int], opened: bool | None):
        self._markers, self._prompt = markers, prompt_token_ids
        self._budget = sampling.thinking_token_budget
        self._writer = markers.tokenizer.writer(sampling.skip_special_tokens)
        self._opened = bool(opened)
        self.phase = Phase.BEFORE if opened is None else Phase.INSIDE if opened else Phase.AFTER
        self.begin: int | None = 0 if opened else None
        self.close: int | None = None
        self.answer: int | None = 0 if opened is False else None
        self._seen = 0  # tokens when it was known that the model thinks: before that no budget can close it
        self._ending: StopTexts | None = None

    @property
    def start_token(self) -> int | None:
        """The token that begins the thinking, where it is one."""
        return self._markers.start.token

    @property
    def awaits(self) -> tuple[int, ...] | None:
        """The token ids that `add` must be told of when they come; None: all."""
        if self.phase is Phase.AFTER:
            return ()
        by_token = self.phase is Phase.INSIDE and self._budget is None
        return (self._markers.end.token,) if by_token and self._markers.end.token is not None else None

    def decline(self) -> None:
        """The row does not think: what it has is its answer."""
        self.phase, self.answer = Phase.AFTER, 0

    def add(self, token_ids: Sequence[int]) -> None:
        """To be told after every new token: all of the row's."""
        if self.phase is Phase.BEFORE:
            self._look_for_start(token_ids)
        elif self.phase is Phase.INSIDE:
            self._look_for_end(token_ids)

    def forced(self, num_tokens: int) -> int | None:
        """The next token, where the budget says it: of the end marker."""
        if self._budget is None or self.begin is None:
            return None
        place, ids = num_tokens - max(self.begin + self._budget, self._seen), self._markers.end.token_ids
        return ids[place] if 0 <= place < len(ids) else None

    def num_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of the thinking, without markers that are tokens of their own."""
        if self.begin is None:
            return 0
        return (len(token_ids) if self.close is None else self.close) - self.begin

    def split(self, token_ids: Sequence[int], text_end: int | None) -> tuple[str, str]:
        """The reasoning and the text of these tokens; `text_end`: characters of the answer up to the stop text.

        Whitespace around the reasoning, and between its end marker and the answer, belongs to neither.
        """
        write, prompt = self._writer.continuation, list(self._prompt)
        if self.begin is None:
            return "", write(prompt, token_ids)[:text_end]
        inside = token_ids[self.begin : self.close]
        thought, rest = write(prompt + list(token_ids[: self.begin]), inside), ""
        if self._markers.start.token is None and not self._opened:
            start, thought = self._markers.start, thought.lstrip()
            thought = thought.removeprefix(start.text if thought.startswith(start.text) else start.shown)
        if self.answer is None:
            return thought.strip(), ""
        if self._markers.end.token is None:
            thought, _, rest = thought.partition(self._markers.end.text)
        before, after = token_ids[: self.answer], token_ids[self.answer :]
        return thought.strip(), (rest + write(prompt + list(before), after)[:text_end]).lstrip()

    def _look_for_start(self, token_ids: Sequence[int]) -> None:
        start = self._markers.start
        if start.token is not None and token_ids[-1] == start.token:
            self.phase, self.begin = Phase.INSIDE, len(token_ids)
            return
        text = self._markers.tokenizer.writer(False).continuation(self._prompt, token_ids).lstrip()
        if start.token is None and text.startswith(start.text):
            self.phase, self.begin, self._seen = Phase.INSIDE, 0, len(token_ids)
        elif (text and (start.token is not None or not start.text.startswith(text))) or len(token_ids) >= _MOST_BLANK:
            self.decline()

    def _look_for_end(self, token_ids: Sequence[int]) -> None:
        end = self._markers.end
        if end.token is not None:
            closed, marked = token_ids[-1] == end.token, 1
        else:
            closed, marked = self._ends(token_ids), 0
        if closed:
            self.phase, self.close, self.answer = Phase.AFTER, len(token_ids) - marked, len(token_ids)

    def _ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of the end marker is there."""
        if self._ending is None:
            writer = self._markers.tokenizer.writer(False)
            self._ending = StopTexts(Sampling(stop=self._markers.end.text), writer, self._prompt)
        return self._ending.find(token_ids) is not None


class Thinking(Protocol):
    """What stop texts ask of a row's thinking: tokens before its answer, None while it has not begun."""

    answer: int | None


def stops_of(
    sampling: Sampling, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], reasoning: "Thinking | None"
) -> "StopTexts | AnswerStops":
    """What finds the stop texts of a row: in all that it says, or, where it may think, in its answer."""
    writer = tokenizer.writer(sampling.skip_special_tokens)
    if reasoning is None:
        return StopTexts(sampling, writer, prompt_token_ids)

    def of_answer(before: Sequence[int]) -> StopTexts:
        least = max(0, sampling.min_new_tokens - len(before))
        return StopTexts(replace(sampling, min_new_tokens=least), writer, [*prompt_token_ids, *before])

    return AnswerStops(reasoning, of_answer)


class AnswerStops:
    """Stop texts that are looked for in the answer alone: `make(before)` finds them behind these generated tokens. Places
    count in the answer's text."""

    def __init__(self, reasoning: "Thinking", make: Callable[[Sequence[int]], StopTexts]):
        self._reasoning, self._make = reasoning, make
        self._found: StopTexts | None = None

    def find(self, token_ids: Sequence[int]) -> int | None:
        """As StopTexts.find."""
        answer = self._reasoning.answer
        if answer is None:
            return None
        if self._found is None:
            self._found = self._make(token_ids[:answer])
        return self._found.find(token_ids[answer:])
