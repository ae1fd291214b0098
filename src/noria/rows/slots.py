"""Who has which slots and pages: of every group, in every tier. Knows nothing of steps and results."""

from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from noria.rows.pages import Pages
from noria.rows.sequence import Samples, Sequence, whole_pages
from noria.rows.waiting import num_pages, num_pages_soon
from noria.step import PAGE_TOKENS

# A row in several runs of pages has its keys and values copied together in every layer of every step: while less of a
# tier than this is free, the first in line waits for a run that holds its prompt and the first half of what it may
# generate. Few rows need more: waiting for all of it would keep more pages idle.
WHOLE_RUNS_BELOW = 0.15


@dataclass(frozen=True)
class Capacity:
    """What admission may fill: see plan.planner, which chooses these numbers.

    `tier_pages`: how many of the pages each tier has, the device's first (empty: all are the device's). A sequence has its
    pages in one tier; in one beyond the device at most `slot_pages`, as its microbatch has.
    """

    groups: int
    num_pages: int
    step_tokens: int
    microbatch_tokens: int
    microbatches: int
    max_positions: int
    vocab_size: int = 2**31
    tier_pages: tuple[int, ...] = ()
    slot_pages: int = 0
    end_words: str = ""

    @property
    def tiers(self) -> tuple[int, ...]:
        return self.tier_pages or (self.num_pages,)

    @property
    def most_pages(self) -> int:
        """Pages that one sequence can have."""
        device, *others = self.tiers
        return max(device, *(min(pages, self.slot_pages) for pages in others)) if others else device


class Slots:
    """The sequences in flight by group and slot, and the pages of each tier.

    active: of each group, its sequences by slot; pages: of each tier.
    """

    def __init__(self, capacity: Capacity):
        self._capacity = capacity
        firsts = accumulate(capacity.tiers, initial=0)
        self.pages = [Pages(count, first) for count, first in zip(capacity.tiers, firsts, strict=False)]
        self.active: list[dict[int, Sequence]] = [{} for _ in range(capacity.groups)]
        self._free = [deque(_slots_of(group, capacity.step_tokens)) for group in range(capacity.groups)]
        self._pages_of_group = [[0] * len(self.pages) for _ in range(capacity.groups)]
        self._released: list[list[int]] = [[] for _ in range(capacity.groups)]

    @property
    def num_active(self) -> int:
        return sum(len(active) for active in self.active)

    def take(self, group: int, sequence: Sequence, num_left: int) -> bool:
        """Gives a sequence a slot and pages of this group if there is room: the group's equal share of both.

        num_left: sequences that are not in flight yet, this one among them.
        """
        active, groups = self.active[group], self._capacity.groups
        if not self._free[group] or len(active) >= -(-(self.num_active + num_left) // groups):
            return False
        samples, limit = sequence.samples, self._capacity.max_positions
        leader = sequence if samples is None else samples.leader
        shared = () if samples is None or leader is sequence else samples.shared
        num_shared = sum(run.count for run in shared)
        count, soon = num_pages(sequence, limit) - num_shared, num_pages_soon(sequence, limit) - num_shared
        tiers = range(len(self.pages)) if leader is sequence else [leader.tier]
        tier = next((tier for tier in tiers if self._has_room(group, tier, count, soon, num_shared)), None)
        if tier is None or (runs := self.pages[tier].reserve(count)) is None:
            return False
        self.pages[tier].share(shared)
        sequence.slot, sequence.num_own_pages, sequence.tier = self._free[group].popleft(), count, tier
        sequence.runs, sequence.cached = (*shared, *runs), num_shared * PAGE_TOKENS
        self._pages_of_group[group][tier] += count
        active[sequence.slot] = sequence
        return True

    def _has_room(self, group: int, tier: int, count: int, soon: int, num_shared: int) -> bool:
        """Whether a sequence of this group may take `count` pages of a tier, of which it fills `soon` first: the group's equal
        share, or all if it is empty."""
        pages = self.pages[tier]
        if tier and count + num_shared > self._capacity.slot_pages:
            return False
        share = max(pages.num_pages // self._capacity.groups, 1)
        fair = not self.active[group] or self._pages_of_group[group][tier] + count <= share
        return fair and count <= pages.num_free and not self._waits_for_a_run(pages, soon)

    def _waits_for_a_run(self, pages: Pages, soon: int) -> bool:
        """Whether no free run holds so many pages, and one may later: pages are short, and sequences in flight free some."""
        short = pages.num_free < WHOLE_RUNS_BELOW * pages.num_pages
        return short and pages.longest < soon and self.num_active > 0

    def hold(self, sequence: Sequence, samples: Samples) -> None:
        """The samples of a prompt hold its pages from their leader's admission to that of the last one.

        That never keeps the first in line waiting for ever: while the samples of a computed prompt wait, no other
        leader is admitted. So all prompts of which samples wait had their leaders in flight at once, each with pages
        for itself.
        """
        if samples.leader is sequence:
            samples.shared = whole_pages(sequence)
            self.pages[sequence.tier].share(samples.shared)
        elif not samples.waiting:
            self.pages[sequence.tier].release(samples.shared)
            samples.shared = ()

    def leave(self, group: int, sequence: Sequence) -> None:
        """The sequence gives back its slot and its pages."""
        del self.active[group][sequence.slot]
        self.pages[sequence.tier].release(sequence.runs)
        self._pages_of_group[group][sequence.tier] -= sequence.num_own_pages
        self._released[group].append(sequence.slot)
        self._free[group].append(sequence.slot)

    def released(self, group: int) -> tuple[int, ...]:
        """The slots that sequences of the group left since this was asked last."""
        slots, self._released[group] = tuple(self._released[group]), []
        return slots


def _slots_of(group: int, per_group: int) -> range:
    return range(group * per_group, (group + 1) * per_group)
