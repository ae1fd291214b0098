"""Who has which slots and pages: of every group, in every tier. Knows nothing of steps and results."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from noria.limits import RUN_PAGES
from noria.rows.beginnings import BLOCK_TOKENS, Lead
from noria.rows.level import StepCosts
from noria.rows.pages import Pages
from noria.rows.prefixes import Prefixes, Share
from noria.rows.reservations import EarlierLengths, Reservations
from noria.rows.sequence import Sequence
from noria.step import NO_STATE, PAGE_TOKENS, Run, pages_for


@dataclass(frozen=True)
class Capacity:
    """What admission may fill: see plan.planner, which chooses these numbers.

    `tier_pages`: how many of the pages each tier has, the device's first (empty: all are the device's). A sequence has its
    pages in one tier; in one beyond the device at most `slot_pages`, as its microbatch has. tier_states: the states of each
    tier, where the family has arrays per sequence; then a microbatch has at most `state_rows` rows (else 0).
    sharing: rows that begin alike share the pages of that. costs: of steps, which several ranks should see in equal times.
    gathers: rows are admitted several at once, since steps without prompts cost less.
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
    sharing: bool = True
    costs: StepCosts | None = None
    gathers: bool = False

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

    active: of each group, its sequences by slot; pages, states: of each tier; before: what earlier jobs tell of lengths.
    """

    def __init__(self, capacity: Capacity, before: EarlierLengths | None = None):
        self._capacity = capacity
        self.pages = _pools(capacity.tiers, RUN_PAGES)
        self.states = _pools(capacity.tier_states)
        self.prefixes = Prefixes(self.pages, self.states if capacity.state_rows else [])
        self.reservations = Reservations(capacity.max_positions, before)
        self.active: list[dict[int, Sequence]] = [{} for _ in range(capacity.groups)]
        self._free = [[*_slots_of(group, capacity.step_tokens)][::-1] for group in range(capacity.groups)]
        self._pages_of_group = [[0] * len(self.pages) for _ in range(capacity.groups)]
        self._states_of_group = [[0] * len(self.states) for _ in range(capacity.groups)]
        self._released: list[list[int]] = [[] for _ in range(capacity.groups)]

    @property
    def num_active(self) -> int:
        return sum(len(active) for active in self.active)

    def take(self, group: int, sequence: Sequence, num_left: int) -> bool | Lead:
        """Gives a sequence a slot and pages of this group if there is room: the group's equal share of both.

        num_left: sequences that are not in flight yet, this one among them. Where what it shares is still being computed:
        nothing, and by whom.
        """
        active, groups = self.active[group], self._capacity.groups
        if not self._free[group] or len(active) >= -(-(self.num_active + num_left) // groups):
            return False
        found = (self._take_in(group, tier, sequence) for tier in range(len(self.pages)))
        return next((one for one in found if one), False)

    def _take_in(self, group: int, tier: int, sequence: Sequence) -> bool | Lead:
        """The same in one tier."""
        share = self.prefixes.share_of(sequence.blocks, tier)
        if not self.prefixes.make_room(tier, 0, self._num_states(share), wanted=False):
            share = self.prefixes.share_of(sequence.blocks, tier, leads=False)
        count = pages_for(self.reservations.first(sequence)) - share.known * RUN_PAGES
        own = count - share.new * RUN_PAGES
        if not self._may_have(group, tier, sequence, own):
            return False
        self.prefixes.hold(share)
        room = self.prefixes.make_room(tier, count, self._num_states(share), not self._is_used(tier))
        if not room or share.pending:
            self.prefixes.drop(share.known_last, tier)
            return share.pending if room and share.pending else False
        self._place(group, sequence, share, own)
        return True

    def _place(self, group: int, sequence: Sequence, share: Share, own: int) -> None:
        """The sequence gets its slot, what it shares, and pages and a state of its own."""
        tier, pages = share.tier, self.pages[share.tier]
        state, *states = self._take_states(group, tier, self._num_states(share))
        if share.new:
            sequence.lead = self.prefixes.lead(share, pages.reserve(share.new * RUN_PAGES) or (), states)
        shared = self.prefixes.runs(share)
        pages.share(shared)
        sequence.hold((*shared, *(pages.reserve(own) or ())))
        sequence.cached, sequence.beginning = share.known * BLOCK_TOKENS, share.last
        sequence.slot, sequence.num_own_pages, sequence.tier = self._free[group].pop(), own, tier
        sequence.place = (tier, *(run.start for run in shared))
        sequence.state, sequence.reads = state, share.state
        self._pages_of_group[group][tier] += own
        self.active[group][sequence.slot] = sequence

    def _num_states(self, share: Share) -> int:
        """States that a sequence takes: its own, and those that it leaves for others."""
        return 1 + len(share.ends) if self._capacity.state_rows else 0

    def _take_states(self, group: int, tier: int, count: int) -> list[int]:
        if not count:
            return [NO_STATE]
        self._states_of_group[group][tier] += 1
        runs = self.states[tier].reserve(count) or ()
        return [id for run in runs for id in range(run.start, run.start + run.count)]

    def _is_used(self, tier: int) -> bool:
        """Whether any sequence in flight has its pages there."""
        return any(of_tier[tier] for of_tier in self._pages_of_group)

    def _may_have(self, group: int, tier: int, sequence: Sequence, own: int) -> bool:
        """Whether a sequence of this group may take so many pages of its own in a tier, and a state: the group's equal share, or
        all if it is empty; and whether it has room there at last."""
        if pages_for(self.reservations.most(sequence)) > self._capacity.pages_of_row(tier):
            return False
        fair = self._pages_of_group[group][tier] + own <= self._share_of(self.pages[tier])
        if self._capacity.state_rows:
            fair &= self._states_of_group[group][tier] < self._share_of(self.states[tier])
        return fair or not self.active[group]

    def _share_of(self, pool: Pages) -> int:
        return max(pool.num_pages // self._capacity.groups, 1)

    def grow(self, group: int, sequence: Sequence) -> bool:
        """More pages for a sequence that needs them: behind those that it has, else another run of them; if any are free."""
        pages, last = self.pages[sequence.tier], sequence.runs[-1]
        more = pages_for(self.reservations.grown(sequence)) - sequence.room // PAGE_TOKENS
        self.prefixes.make_room(sequence.tier, RUN_PAGES, 0, wanted=False)
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

    def youngest(self, group: int, beside: Sequence) -> Sequence:
        """Of the group's sequences in this one's tier, itself among them, the one that was admitted last."""
        same = (one for one in self.active[group].values() if one.tier == beside.tier)
        return max(same, key=lambda one: one.order)

    def move(self, sequence: Sequence, group: int, other: int) -> None:
        """The sequence goes from a group to another one with all that it has, but for its slot: it gets one there."""
        self._vacate(group, sequence)
        sequence.slot = self._free[other].pop()
        self.active[other][sequence.slot] = sequence
        self._pages_of_group[other][sequence.tier] += sequence.num_own_pages
        if sequence.state != NO_STATE:
            self._states_of_group[other][sequence.tier] += 1

    def ended(self, sequence: Sequence, running: Iterable[int]) -> None:
        """A sequence that left has ended: what it has needed tells what others will, with so many tokens of those in flight."""
        self.reservations.ended(len(sequence.token_ids), running)

    def leave(self, group: int, sequence: Sequence) -> None:
        """The sequence gives back its slot and its pages; what it should have computed for others, and has not, is gone."""
        self._vacate(group, sequence)
        self.pages[sequence.tier].release(sequence.runs)
        self.prefixes.drop(sequence.beginning, sequence.tier)
        if sequence.lead is not None:
            self.prefixes.abandon(sequence.lead)
        if sequence.state != NO_STATE:
            self.states[sequence.tier].release((Run(sequence.state, 1),))

    def _vacate(self, group: int, sequence: Sequence) -> None:
        """The group has the sequence no longer: its slot is free, and what it holds is no part of the group's share."""
        del self.active[group][sequence.slot]
        self._pages_of_group[group][sequence.tier] -= sequence.num_own_pages
        if sequence.state != NO_STATE:
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
