"""Prompts as token ids, made by a thread beside the steps before rows are asked for, so that no step waits for a tokenizer;
those of the first steps are read by it too, while the weights load.

Knows neither what encodes a prompt nor what is made of it.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from noria.rows.prompts import Prompt

AHEAD = 64  # rows that are read before the one that is asked for
EARLY, EARLY_LENGTH = (
    1024,
    2**22,
)  # rows, and their characters or token ids, that are read before the first one is asked for


class EncodedAhead:
    """`prompts` come in their order; `encode` gives the token ids of each of them, or raises what encoding it raised.

    wanted: whether a prompt is to be encoded ahead; others are encoded when they are asked for. What is read before the first
    prompt is asked for is read by a thread; `close` ends that, where nobody asks any more.
    """

    def __init__(
        self, prompts: Iterable[Prompt], encode: Callable[[Prompt], list[int]], wanted: Callable[[Prompt], bool]
    ):
        self._unread, self._encode, self._wanted = iter(prompts), encode, wanted
        self._thread = ThreadPoolExecutor(1, "encodes prompts")
        self._coming: dict[int, Future[list[int]]] = {}  # by row
        self._ahead: deque[Prompt] = deque()
        self._failure: Exception | None = None  # of reading
        self._asked = threading.Event()
        self._early = self._thread.submit(self._read_early)

    def close(self) -> None:
        self._asked.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def prompts(self) -> Iterator[Prompt]:
        """The prompts, each of which is told to `encode` before the next one is taken, or never. What reading raises comes behind
        those that were read."""
        self._asked.set()
        self._early.result()
        while self._ahead or self._read():
            while self._coming and len(self._ahead) <= AHEAD and self._read():  # no more than what is to be encoded
                pass
            prompt = self._ahead.popleft()
            yield prompt
            self._coming.pop(prompt.row, None)  # nobody asked for it
        if self._failure is not None:
            raise self._failure

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids."""
        coming = self._coming.pop(prompt.row, None)
        return self._encode(prompt) if coming is None else coming.result()

    def _read_early(self) -> None:
        length = 0
        while not self._asked.is_set() and len(self._ahead) < EARLY and length < EARLY_LENGTH and self._read():
            prompt = self._ahead[-1]
            length += len(prompt.prompt) + len(prompt.token_ids or ())

    def _read(self) -> bool:
        """Reads the next prompt. Whether there was one."""
        if self._failure is not None:
            return False
        try:
            prompt = next(self._unread, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised behind what was read before
            self._failure = error
            return False
        if prompt is not None:
            self._ahead.append(prompt)
            if self._wanted(prompt):
                self._coming[prompt.row] = self._thread.submit(self._encode, prompt)
        return prompt is not None
