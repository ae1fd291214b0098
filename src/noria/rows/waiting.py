"""The line of sequences that wait: prompts are read ahead, so that rows which begin alike follow one another.

Knows neither slots nor pages.
"""

import heapq
from bisect import insort
from typing import TypeAlias

from noria.rows.beginnings import WINDOW, Beginnings, Lead, order_of
from noria.rows.making import Maker, Source
from noria.rows.sequence import Sequence

READ_FIRST = 64  # prompts, before the first row is admitted
READ_MORE = 4  # with each row that is admitted: until WINDOW rows are in line, or as many tokens
WINDOW_TOKENS = 2**21

Entry: TypeAlias = tuple[tuple[int, ...], int, Sequence]  # its order, how many came before it


class WaitingQueue:
    """Sequences in line. Those that returned there go first. The others are in the order of their prompts, unless rows that begin
    alike are `sharing` that: such a row follows the first one of them. Those whose beginning is being computed step aside."""

    def __init__(self, source: Source, maker: Maker, sharing: bool = True):
        self._maker, self._sharing = maker, sharing
        self._prompts = iter(source.prompts)
        self._beginnings = Beginnings()
        self._line: list[Entry] = []
        self._parked: dict[Lead, list[Sequence]] = {}
        self._returned: list[Sequence] = []
        self._num_waiting = self._num_tokens = self._num_entered = 0
        self._to_read = READ_FIRST
        self._failure: Exception | None = None  # of reading: raised when all that was read before it is generated

    @property
    def num_left(self) -> int:
        """Sequences that wait or are still in the prompts, as far as that can be known."""
        return self._maker.num_unread + self._num_waiting

    @property
    def has_returned(self) -> bool:
        """Whether the first is one that was in flight."""
        return bool(self._returned)

    def first(self) -> Sequence | None:
        """The sequence that waits first. Prompts that cannot run are finished here, with their error. None: all others that were
        read stand aside, or the last one has left; if reading failed, its error is raised then."""
        if self._returned:
            return self._returned[0]
        while self._reads_on() and self._read():
            pass
        if not self._line and not self._parked and self._failure is not None:
            raise self._failure
        return self._line[0][-1] if self._line else None

    def take(self) -> None:
        """The first leaves the line."""
        if self._returned:
            sequence = self._returned.pop(0)
        else:
            sequence = heapq.heappop(self._line)[-1]
            self._maker.steer(sequence)
            self._to_read += READ_MORE
        self._num_waiting -= 1
        self._num_tokens -= len(sequence.prompt_token_ids)
        self._beginnings.leave(sequence.blocks)
        sequence.blocks = []

    def park(self, lead: Lead) -> None:
        """The first stands aside until what it shares is computed."""
        sequence = self._returned.pop(0) if self._returned else heapq.heappop(self._line)[-1]
        self._parked.setdefault(lead, []).append(sequence)

    def unpark(self, lead: Lead) -> None:
        """Those that stood aside for this are in line again."""
        for sequence in self._parked.pop(lead, ()):
            self._put(sequence)

    def give_back(self, sequence: Sequence) -> None:
        """A sequence that was in flight returns to the line with its tokens."""
        self._enter([sequence])

    def withdraw(self) -> list[Sequence]:
        """The sequences that returned leave the line."""
        parked = [one for sequences in self._parked.values() for one in sequences if one.returned]
        taken, self._returned = [*self._returned, *parked], []
        self._parked = {lead: [one for one in some if not one.returned] for lead, some in self._parked.items()}
        self._num_waiting -= len(taken)
        return taken

    def _reads_on(self) -> bool:
        if not self._line and not self._parked:
            return True
        most = READ_FIRST if self._maker.guides.constraints.crowded else WINDOW
        return self._sharing and self._to_read > 0 and self._num_waiting < most and self._num_tokens < WINDOW_TOKENS

    def _read(self) -> bool:
        """Puts the rows of the next prompt in line. Whether there was one."""
        if self._failure is not None:
            return False
        try:
            prompt = next(self._prompts, None)
            if prompt is None:
                return False
            sequences = self._maker.of(prompt)
        except Exception as error:  # noqa: BLE001 - whatever it is, the rows before it are generated first
            self._failure = error
            return False
        if sequences:
            self._enter(sequences)
            self._to_read -= 1
        return True

    def _enter(self, sequences: list[Sequence]) -> None:
        first = sequences[0]
        shares = self._sharing and first.prompt_logprobs is None  # whoever wants those of its prompt computes it
        ids = first.prompt_token_ids
        blocks = self._beginnings.enter(ids, first.prompt.row, len(sequences)) if shares else []
        for sequence in sequences:
            sequence.blocks = blocks
            self._put(sequence)
        self._num_waiting += len(sequences)
        self._num_tokens += len(sequences) * len(ids)

    def _put(self, sequence: Sequence) -> None:
        if sequence.returned:
            insort(self._returned, sequence, key=lambda one: one.order)
            return
        order = order_of(sequence.blocks, sequence.prompt.row, sequence.sample)
        self._num_entered += 1
        heapq.heappush(self._line, (order, self._num_entered, sequence))
