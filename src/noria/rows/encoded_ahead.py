"""Prompts as token ids, made by a thread beside the steps before rows are asked for, so that no step waits for a tokenizer.

Knows neither what encodes a prompt nor what is made of it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from noria.rows.prompts import Prompt

AHEAD = 64  # rows that are read before the one that is asked for


class EncodedAhead:
    """`prompts` come in their order; `encode` gives the token ids of each of them, or raises what encoding it raised.

    wanted: whether a prompt is to be encoded ahead; others are encoded when they are asked for.
    """

    def __init__(
        self, prompts: Iterable[Prompt], encode: Callable[[Prompt], list[int]], wanted: Callable[[Prompt], bool]
    ):
        self._prompts, self._encode, self._wanted = prompts, encode, wanted
        self._thread = ThreadPoolExecutor(1, "encodes prompts")
        self._coming: dict[int, Future[list[int]]] = {}  # by row

    @property
    def prompts(self) -> Iterator[Prompt]:
        """The prompts, each of which is told to `encode` before the next one is taken, or never. What reading raises comes behind
        those that were read."""
        ahead: deque[Prompt] = deque()
        failure: Exception | None = None
        try:
            for prompt in self._prompts:
                ahead.append(prompt)
                if self._wanted(prompt):
                    self._coming[prompt.row] = self._thread.submit(self._encode, prompt)
                if not self._coming or len(ahead) > AHEAD:  # nothing is read before it is needed but to be encoded
                    yield from self._first(ahead)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it would have been
            failure = error
        while ahead:
            yield from self._first(ahead)
        if failure is not None:
            raise failure

    def _first(self, ahead: deque[Prompt]) -> Iterator[Prompt]:
        prompt = ahead.popleft()
        yield prompt
        self._coming.pop(prompt.row, None)  # nobody asked for it

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids."""
        coming = self._coming.pop(prompt.row, None)
        return self._encode(prompt) if coming is None else coming.result()
