"""Prompts as token ids, made by a thread beside the steps before rows are asked for, so that no step waits for a tokenizer;
those of the first steps are read by one too, while the weights load.

Knows neither what encodes a prompt nor what is made of it.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from noria.rows.prompts import Prompt

AHEAD = 64  # rows that are read before the one that is asked for
EARLY = 1024  # rows that are read while the weights load, unless they are
EARLY_LENGTH = 2**22  # characters or token ids


class EncodedAhead:
    """`prompts` come in their order; `encode` gives the token ids of each of them, or raises what encoding it raised.

    wanted: whether a prompt is to be encoded ahead; others are encoded when they are asked for. A thread reads the first prompts,
    until `close`.
    """

    def __init__(
        self, prompts: Iterable[Prompt], encode: Callable[[Prompt], list[int]], wanted: Callable[[Prompt], bool]
    ):
        self._unread, self._encode, self._wanted = iter(prompts), encode, wanted
        self._reader, self._encoder = (ThreadPoolExecutor(1, f"{what} prompts") for what in ("reads", "encodes"))
        self._coming: dict[int, Future[list[int]]] = {}  # by row
        self._ahead: deque[Prompt] = deque()
        self._failure: Exception | None = None  # of reading
        self._reading, self._closed = threading.Lock(), False
        self._early = self._reader.submit(self._read_early)

    def close(self) -> None:
        self._closed = True
        for thread in (self._reader, self._encoder):
            thread.shutdown(wait=False, cancel_futures=True)

    @property
    def prompts(self) -> Iterator[Prompt]:
        """The prompts, each of which is told to `encode` before the next one is taken, or never. What reading raises comes behind
        those that were read."""
        while self._ahead or self._read() or self._ahead:
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
        for _ in range(EARLY):
            prompt = None if self._closed or length > EARLY_LENGTH else self._read()
            if prompt is None:
                break
            length += len(prompt.prompt) + len(prompt.token_ids or ())

    def _read(self) -> Prompt | None:
        """Reads the next prompt, if there is one."""
        with self._reading:
            try:
                prompt = None if self._failure is not None else next(self._unread, None)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised behind what was read before
                self._failure, prompt = error, None
            if prompt is not None:
                if self._wanted(prompt):
                    self._coming[prompt.row] = self._encoder.submit(self._encode, prompt)
                self._ahead.append(prompt)
        return prompt
