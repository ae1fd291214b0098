"""Who has which slots and pages: of every group, in every tier. Knows nothing of steps and results."""

from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from noria.limits import RUN_PAGES
from noria.rows.pages import Pages
from noria.rows.reservations import Reservations
from noria.rows.sequence import Samples, Sequence, num_whole_pages, whole_pages
from noria.step import NO_STATE, PAGE_TOKENS, Run, pages_for


@dataclass(frozen=True)
class Capacity:
    """What admission may fill: see plan.planner, which chooses these numbers.

    `tier_pages`: how many of the pages each tier has, the device's first (empty: all are the device's). A sequence has its
    pages in one tier; in one beyond the device at most `slot_pages`, as its microbatch has. tier_states: the states of each
    tier, where the family has arrays per sequence; then a microbatch has at most `state_rows` rows (else 0).
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
    tier_states: tuple[int, ...] = ()
    state_rows: int = 0

    @property
    def tiers(self) -> tuple[int, ...]:
        return self.tier_pages or (self.num_pages,)

    @property
    def most_pages(self) -> int:
        """Pages that one sequence can have."""
        return max(self.pages_of_row(tier) for tier in range(len(self.tiers)))

    def pages_of_row(self, tier: int) -> int:
        """Pages that one sequence can have in this tier."""
        pages = min(self.tiers[tier], self.slot_pages) if tier else self.tiers[tier]
        return in_runs(pages)


class Slots:
    """The sequences in flight by group and slot, and the pages and states of each tier.

    active: of each group, its sequences by slot; pages, states: of each tier.
    """

    def __init__(self, capacity: Capacity):
        self._capacity = capacity
        self.pages = _pools(capacity.tiers, RUN_PAGES)
        self.states = _pools(capacity.tier_states)
        self.reservations = Reservations(capacity.max_positions)
        self.active: list[dict[int, Sequence]] = [{} for _ in range(capacity.groups)]
        self._free = [deque(_slots_of(group, capacity.step_tokens)) for group in range(capacity.groups)]
        self._pages_of_group = [[0] * len(self.pages) for _ in range(capacity.groups)]
        self._states_of_group = [[0] * len(self.states) for _ in range(capacity.groups)]
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
        samples = sequence.samples
        leader = sequence if samples is None else samples.leader
        shared = () if samples is None or leader is sequence else samples.shared
        num_shared = sum(run.count for run in shared)
        count = pages_for(self.reservations.first(sequence)) - num_shared
        most = pages_for(self.reservations.most(sequence))
        tiers = range(len(self.pages)) if leader is sequence else [leader.tier]
        states = self._num_states(sequence)
        tier = next((tier for tier in tiers if self._has_room(group, tier, count, most, states)), None)
        if tier is None or (runs := self.pages[tier].reserve(count)) is None:
            return False
        self.pages[tier].share(shared)
        if states:
            self._take_states(group, tier, sequence, states)
        sequence.slot, sequence.num_own_pages, sequence.tier = self._free[group].popleft(), count, tier
        sequence.hold((*shared, *runs))
        sequence.cached = num_shared * PAGE_TOKENS
        self._pages_of_group[group][tier] += count
        active[sequence.slot] = sequence
        return True

    def _num_states(self, sequence: Sequence) -> int:
        """States that a sequence takes: its own, and as leader that of a beginning which it shares."""
        if not self._capacity.state_rows:
            return 0
        samples = sequence.samples
        return 2 if samples is not None and samples.leader is sequence and num_whole_pages(sequence) else 1

    def _has_states(self, group: int, tier: int, count: int) -> bool:
        """Whether a sequence of this group may take `count` states of a tier: an equal share, or all if the group is empty."""
        states, own = self.states[tier], self._states_of_group[group][tier]
        fair = not self.active[group] or own + count <= max(states.num_pages // self._capacity.groups, 1)
        return fair and count <= states.num_free

    def _take_states(self, group: int, tier: int, sequence: Sequence, count: int) -> None:
        """Gives a sequence its state; one that begins with others' pages reads what their leader left, a leader gets that."""
        runs, samples = self.states[tier].reserve(count) or (), sequence.samples
        sequence.state, *shared = [id for run in runs for id in range(run.start, run.start + run.count)]
        self._states_of_group[group][tier] += 1
        if samples is not None and samples.leader is sequence:
            samples.state = shared[0] if shared else NO_STATE
        elif samples is not None:
            sequence.reads = samples.state

    def _has_room(self, group: int, tier: int, count: int, most: int, states: int) -> bool:
        """Whether a sequence of this group, which has `most` pages at last, may take `count` of a tier now, and its states: the
        group's equal share, or all if it is empty."""
        pages = self.pages[tier]
        if states and not self._has_states(group, tier, states):
            return False
        if most > self._capacity.pages_of_row(tier):
            return False
        share = max(pages.num_pages // self._capacity.groups, 1)
        fair = not self.active[group] or self._pages_of_group[group][tier] + count <= share
        return fair and count <= pages.num_free

    def grow(self, group: int, sequence: Sequence) -> bool:
        """More pages for a sequence that needs them: behind those that it has, else another run of them; if any are free."""
        pages, last = self.pages[sequence.tier], sequence.runs[-1]
        more = pages_for(self.reservations.grown(sequence)) - sequence.room // PAGE_TOKENS
        longer = pages.extend(last, more)
        if longer.count > last.count:
            sequence.hold((*sequence.runs[:-1], longer))
            taken = longer.count - last.count
        else:
            taken = min(more, pages.longest)
            sequence.hold((*sequence.runs, *(pages.reserve(taken) or ())))
        sequence.num_own_pages += taken
        self._pages_of_group[group][sequence.tier] += taken
        return taken > 0

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
            if samples.state != NO_STATE:  # read in the step that is being composed, before any row writes it
                self.states[sequence.tier].release((Run(samples.state, 1),))
                samples.state = NO_STATE

    def youngest(self, group: int, beside: Sequence) -> Sequence:
        """Of the group's sequences in this one's tier, itself among them, the one that was admitted last."""
        same = (one for one in self.active[group].values() if one.tier == beside.tier)
        return max((one for one in same if one is beside or one.samples is None), key=lambda one: one.order)

    def ended(self, sequence: Sequence) -> None:
        """A sequence that left has ended: what it has needed tells what others will."""
        running = (len(one.token_ids) for active in self.active for one in active.values())
        self.reservations.ended(len(sequence.token_ids), running)

    def leave(self, group: int, sequence: Sequence) -> None:
        """The sequence gives back its slot and its pages."""
        del self.active[group][sequence.slot]
        self.pages[sequence.tier].release(sequence.runs)
        self._pages_of_group[group][sequence.tier] -= sequence.num_own_pages
        if sequence.state != NO_STATE:
            self.states[sequence.tier].release((Run(sequence.state, 1),))
            self._states_of_group[group][sequence.tier] -= 1
        self._released[group].append(sequence.slot)
        self._free[group].append(sequence.slot)

    def released(self, group: int) -> tuple[int, ...]:
        """The slots that sequences of the group left since this was asked last."""
        slots, self._released[group] = tuple(self._released[group]), []
        return slots


def in_runs(pages: int) -> int:
    """Those of so many pages that make whole multiples of RUN_PAGES."""
    return pages // RUN_PAGES * RUN_PAGES


def _pools(counts: tuple[int, ...], unit: int = 1) -> list[Pages]:
    """Of each tier its ids, which go on from one tier to the next; as many as make multiples of `unit`."""
    firsts = accumulate(counts, initial=0)
    return [Pages(count // unit * unit, first) for count, first in zip(counts, firsts, strict=False)]


def _slots_of(group: int, per_group: int) -> range:
    return range(group * per_group, (group + 1) * per_group)
