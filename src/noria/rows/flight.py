"""A group's rows in flight. Those that take a token a step are arrays by slot: a step of them is made, and its result taken in,
by index expressions, and Python looks only at rows where something happens.

A step may be composed before the result of the step before it is there: then tokens have been made that are not known yet.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterator
from itertools import count

import numpy as np

from noria.rows.guides import steers
from noria.rows.randomness import begun, uniforms
from noria.rows.sequence import Sequence
from noria.step import NO_TOKEN, Step

MOST_ENDS = 8  # token ids that end a row, compared at once; a row with more is looked at
KEPT = 128  # tokens of a row that are kept here before its list gets them

_NOBODY = -1
_ROW = np.dtype(
    [
        ("serial", np.int64),  # who has the slot, as counted here; _NOBODY
        ("cached", np.int32),  # tokens in the cache or on their way there
        ("room", np.int32),  # tokens that its pages hold
        ("made", np.int32),  # tokens generated, those of steps under way among them
        ("known", np.int32),  # of them, those whose ids are known
        ("limit", np.int32),  # tokens that it generates at most
        ("last", np.int32),  # id of the last one known
        ("place", np.int32),  # of its last sample in its step
        ("watched", np.bool_),  # something looks at each of its tokens
        ("many", np.bool_),  # more token ids end it than `ends` has
        ("steered", np.bool_),  # its samples may be masked
        ("draws", np.bool_),
        ("begun", np.uint64),  # see randomness.begun
        ("sample", np.int64),
        ("reads", np.int32),
        ("writes", np.int32),
        ("ends", np.int32, MOST_ENDS),  # token ids that end it, or at which must be looked; and what is none
        ("tokens", np.int32, KEPT),  # those that its list lacks: from `first` to `column`
        ("first", np.int32),
        ("column", np.int32),
    ]
)
_NO_ID = -9  # neither a token's id nor what stands for none


class Flight:
    """The rows of the slots from `first_slot` on. `filling`: by slot, in the order of their admission, those that compute tokens
    which they have; all others are in the arrays.

    end_token_ids: of the model; max_positions: of its context.
    """

    def __init__(self, first_slot: int, end_token_ids: Collection[int], max_positions: int):
        self._first_slot, self._end_token_ids, self._max_positions = first_slot, end_token_ids, max_positions
        self.filling: dict[int, Sequence] = {}
        self._rows = np.zeros(0, _ROW)
        self._order = np.empty(0, np.int64)  # of those in the arrays, as they follow one another in a step
        self._keys: list[tuple[tuple[int, ...], int]] = []  # by which they do: rows of one beginning side by side
        self._serials = count()
        # Serials of each step's rows, and of its samples.
        self._under_way: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def enter(self, sequence: Sequence) -> None:
        """A sequence got a slot, and computes what it has."""
        at = sequence.slot - self._first_slot
        if at >= len(self._rows):
            more = np.zeros(max(at + 1, 64) + len(self._rows), _ROW)
            more["serial"] = _NOBODY
            more[: len(self._rows)] = self._rows
            self._rows = more
        self._rows["serial"][at] = next(self._serials)
        self.filling[sequence.slot] = sequence

    def decode(self, sequence: Sequence) -> None:
        """All that a sequence has is computed, and its next token is sampled in the step that is being composed."""
        del self.filling[sequence.slot]
        at, sampling, prompt = sequence.slot - self._first_slot, sequence.sampling, len(sequence.prompt_token_ids)
        row = sequence.prompt.row if sequence.drawn_as is None else sequence.drawn_as
        rows = self._rows
        rows["cached"][at], rows["room"][at] = sequence.cached, sequence.room
        rows["known"][at] = known = len(sequence.token_ids)
        rows["made"][at] = known + 1
        rows["limit"][at] = min(sampling.most_new_tokens, self._max_positions - prompt, 2**31 - 1)
        rows["steered"][at] = sequence.guide is not None and steers(sampling)
        rows["draws"][at], rows["begun"][at] = bool(sampling.temperature), begun(sampling.seed or 0, row)
        rows["sample"][at] = sequence.sample
        rows["reads"][at], rows["writes"][at] = sequence.reads, sequence.state
        rows["first"][at] = rows["column"][at] = at % KEPT  # not all are full in the same step
        key = sequence.place, sequence.order
        where = bisect_right(self._keys, key)
        self._keys.insert(where, key)
        self._order = np.insert(self._order, where, at)

        self.watch(sequence)

    def watch(self, sequence: Sequence) -> None:
        """At which of the sequence's tokens must be looked from now on."""
        at, sampling, awaited = sequence.slot - self._first_slot, sequence.sampling, _awaited(sequence)
        ends = [*{*(() if sampling.ignore_eos else self._end_token_ids), *sampling.stop_ids, *(awaited or ())}]
        self._rows["watched"][at], self._rows["many"][at] = awaited is None, len(ends) > MOST_ENDS
        self._rows["ends"][at] = (ends + MOST_ENDS * [_NO_ID])[:MOST_ENDS]

    def leave(self, sequence: Sequence) -> None:
        """A sequence is out of flight, with all its tokens that are known."""
        at = sequence.slot - self._first_slot
        if self.filling.pop(sequence.slot, None) is None:
            self.tell(sequence)
            where = int(np.flatnonzero(self._order == at)[0])
            self._order = np.delete(self._order, where)
            del self._keys[where]
        self._rows["serial"][at] = _NOBODY

    def give(self, sequence: Sequence) -> None:
        """A sequence, of which no step is under way, leaves for another flight, which it may enter with all that it has."""
        at = sequence.slot - self._first_slot
        if sequence.slot not in self.filling:
            sequence.cached, sequence.reads = int(self._rows["cached"][at]), int(self._rows["reads"][at])
        self.leave(sequence)

    def tell(self, sequence: Sequence) -> None:
        """The sequence gets the tokens that it lacks."""
        at = sequence.slot - self._first_slot
        first, column = int(self._rows["first"][at]), int(self._rows["column"][at])
        sequence.token_ids += self._rows["tokens"][at, first:column].tolist()
        self._rows["first"][at] = self._rows["column"][at] = 0

    def lengths(self) -> Iterator[int]:
        """How many tokens each row has generated, as far as they are known."""
        yield from self._rows["known"][self._order].tolist()
        yield from (len(sequence.token_ids) for sequence in self.filling.values())

    def hold(self, sequence: Sequence) -> None:
        """The sequence has other pages than before."""
        self._rows["room"][sequence.slot - self._first_slot] = sequence.room

    def outgrown(self) -> list[int]:
        """The slots of rows whose pages do not hold their next token."""
        ready = self.ready()
        return (ready[self._rows["cached"][ready] >= self._rows["room"][ready]] + self._first_slot).tolist()

    def ready(self) -> np.ndarray:
        """[D] the rows that take a token in the next step, as they follow one another there: those that do not end before it."""
        rows = self._order
        going = self._rows["made"][rows] < self._rows["limit"][rows]
        return rows if going.all() else rows[going]

    def where(self, ready: np.ndarray, sequences: list[Sequence]) -> list[int]:
        """Of each of these sequences, that are filling: before which of the rows that take a token it comes in a step."""
        places = [bisect_right(self._keys, sequence.place, key=lambda key: key[0]) for sequence in sequences]
        if len(ready) == len(self._order):
            return places
        passed = np.concatenate([[0], np.cumsum(np.isin(self._order, ready))])
        return passed[places].tolist()

    def slots(self, ready: np.ndarray) -> np.ndarray:
        """[D] int32 the slots of these rows."""
        return (ready + self._first_slot).astype(np.int32)

    def positions(self, ready: np.ndarray) -> np.ndarray:
        """[D] int32 the position of the token that each computes."""
        return self._rows["cached"][ready]

    def token_ids(self, ready: np.ndarray) -> np.ndarray:
        """[D] int32 the token that each computes; -1 - i: what is sampled as number i of the step under way."""
        rows = self._rows
        awaited = rows["made"][ready] > rows["known"][ready]
        return np.where(awaited, -1 - rows["place"][ready], rows["last"][ready])

    def uniforms(self, ready: np.ndarray) -> np.ndarray:
        """[D] the random number of each one's next token; a greedy row needs none."""
        rows = self._rows
        draws = rows["draws"][ready]
        if not draws.any():
            return np.zeros(len(ready))
        return np.where(draws, uniforms(rows["begun"][ready], rows["sample"][ready], rows["made"][ready]), 0.0)

    def states(self, ready: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[D] the states that each one's step reads and writes; the step after it reads what it wrote."""
        reads, writes = self._rows["reads"][ready], self._rows["writes"][ready]
        self._rows["reads"][ready] = writes
        return reads, writes

    def advance(self, ready: np.ndarray) -> None:
        """A step with these rows is being composed: each computes a token and samples one."""
        self._rows["cached"][ready] += 1
        self._rows["made"][ready] += 1

    def composed(self, step: Step) -> None:
        """The step is under way."""
        samples = step.sample_slots - self._first_slot
        self._rows["place"][samples] = np.arange(len(samples))
        serials = self._rows["serial"]
        self._under_way.append((serials[step.slots - self._first_slot], serials[samples]))

    def steered(self, step: Step) -> list[int]:
        """Which of the samples of the step composed last may be masked, where their rows are still in flight."""
        samples = step.sample_slots - self._first_slot
        alive = self._rows["serial"][samples] == self._under_way[-1][1]
        return np.flatnonzero(self._rows["steered"][samples] & alive).tolist()

    @property
    def awaits(self) -> bool:
        """Whether a step before the one that was composed last is still under way."""
        return len(self._under_way) > 1

    def arrived(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """The result of the step that has been under way longest is there: which of its rows [R], and of its samples [S], are
        still in flight."""
        of_rows, of_samples = self._under_way.popleft()
        serials = self._rows["serial"]
        return serials[step.slots - self._first_slot] == of_rows, serials[
            step.sample_slots - self._first_slot
        ] == of_samples

    def take(self, step: Step, token_ids: np.ndarray, alive: np.ndarray) -> list[tuple[int, bool, bool]]:
        """Takes in what these of the step's samples are. Returns those that must be looked at, which are in no row's list:
        which, whether the row may end with it, and whether the list lacks others before it (see `tell`)."""
        rows, samples = self._rows, step.sample_slots - self._first_slot
        ends = (rows["ends"][samples] == token_ids[:, None]).any(1) | (token_ids <= NO_TOKEN) | rows["many"][samples]
        ends |= rows["known"][samples] + 1 >= rows["limit"][samples]
        watched = rows["watched"][samples]
        its = samples[alive]
        rows["last"][its] = token_ids[alive]
        rows["known"][its] += 1
        plain = alive & ~(ends | watched)
        its = samples[plain]
        rows["tokens"][its, rows["column"][its]] = token_ids[plain]
        rows["column"][its] += 1
        look = np.flatnonzero(alive & ~plain)
        return list(zip(look.tolist(), ends[look].tolist(), (~watched[look]).tolist(), strict=True))

    def full(self, step: Step) -> list[int]:
        """Slots of the step's samples whose lists should be told their tokens, before more come."""
        samples = step.sample_slots - self._first_slot
        full = (self._rows["column"][samples] >= KEPT) & (self._rows["serial"][samples] != _NOBODY)
        return step.sample_slots[full].tolist() if full.any() else []


def _awaited(sequence: Sequence) -> tuple[int, ...] | None:
    """The token ids at which something looks, beside those that end the sequence; None: at all of them."""
    sampling = sequence.sampling
    if sequence.stop_texts is not None or sampling.logprobs is not None or sequence.prompt_logprobs is not None:
        return None
    return sequence.guide.awaits if sequence.guide is not None else ()
