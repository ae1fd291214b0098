"""Beginnings that rows share: where they lie in the cache, who computes them, and which give way where pages are short.

A tier has its own, and rows that share one have all their pages there. Knows neither groups nor steps.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from noria.limits import RUN_PAGES
from noria.rows.beginnings import BLOCK_TOKENS, BlockPages, Lead, PromptBlock, forget
from noria.rows.pages import Pages
from noria.step import NO_STATE, Run


@dataclass(frozen=True)
class Share:
    """What a row would share in a tier: its first `known` blocks lie there; it would compute the `new` ones behind them for
    others too, where runs of pages end behind the blocks numbered `ends`."""

    tier: int
    blocks: Sequence[PromptBlock]
    known: int
    new: int
    ends: tuple[int, ...] = ()

    @property
    def pending(self) -> Lead | None:
        """Who still computes what the row shares."""
        return self.blocks[self.known - 1].places[self.tier].lead if self.known else None

    @property
    def known_last(self) -> PromptBlock | None:
        """The last block that lies there."""
        return self.blocks[self.known - 1] if self.known else None

    @property
    def last(self) -> PromptBlock | None:
        """The last block that it shares."""
        return self.blocks[self.known + self.new - 1] if self.known + self.new else None

    @property
    def state(self) -> int:
        """What the row begins from."""
        return self.blocks[self.known - 1].places[self.tier].state if self.known else NO_STATE


class Prefixes:
    """The beginnings that lie in tiers. pages, states: of each tier; a family without states has none of these."""

    def __init__(self, pages: list[Pages], states: list[Pages]):
        self._pages, self._states = pages, states
        # Of each tier blocks that no row in flight shares, without one behind them: the longest unused first.
        self._idle: list[OrderedDict[PromptBlock, None]] = [OrderedDict() for _ in pages]
        self.num_pages = [0] * len(pages)

    def share_of(self, blocks: Sequence[PromptBlock], tier: int, leads: bool = True) -> Share:
        """What a row that is in line with these blocks would share. Unless it `leads` it computes nothing for others."""
        known = live = sum(1 for _ in _live(blocks, tier))
        while self._states and known and blocks[known - 1].places[tier].state == NO_STATE:
            known -= 1
        new = 0
        while leads and known == live and known + new < len(blocks) and blocks[known + new].waiting > 1:
            new += 1
        return Share(tier, blocks, known, new, _ends(blocks, known, new))

    def hold(self, share: Share) -> None:
        """What is known of it stays where it is from now on."""
        if (block := share.known_last) is not None:
            block.places[share.tier].users += 1
            self._idle[share.tier].pop(block, None)

    def drop(self, block: PromptBlock | None, tier: int) -> None:
        """A row that shares up to this block needs it no more."""
        if block is not None:
            block.places[tier].users -= 1
            self._look(block, tier)

    def lead(self, share: Share, pages: Sequence[Run], states: Sequence[int]) -> Lead:
        """The row, which holds what is known, computes the new blocks into these pages, and leaves these states behind `ends`."""
        tier, new = share.tier, list(share.blocks[share.known : share.known + share.new])
        if share.known:
            before = share.blocks[share.known - 1].places[tier]
            before.users, before.followers, before.ends = before.users - 1, before.followers + 1, True
        lead = Lead(tier, new, (share.known + share.new) * BLOCK_TOKENS)
        firsts = [page for run in pages for page in range(run.start, run.start + run.count, RUN_PAGES)]
        for block, page in zip(new, firsts, strict=True):
            block.places[tier] = BlockPages(
                page, lead, users=int(block is new[-1]), followers=int(block is not new[-1])
            )
        for end in share.ends:
            share.blocks[end - 1].places[tier].ends = True
        for end, state in zip(share.ends, states, strict=bool(states)):
            share.blocks[end - 1].places[tier].state = state
            lead.stops.append((end * BLOCK_TOKENS, state))
        self.num_pages[tier] += len(new) * RUN_PAGES
        return lead

    def done(self, lead: Lead) -> None:
        """What a row computes for others is in the cache of all later steps."""
        for block in lead.blocks:
            block.places[lead.tier].lead = None

    def abandon(self, lead: Lead) -> None:
        """The row left before it was done, and holds nothing any more."""
        for block in reversed(lead.blocks):
            self._remove(block, lead.tier)

    def runs(self, share: Share) -> tuple[Run, ...]:
        """The pages of all that a row shares: the same runs for all rows that share the same."""
        runs: list[Run] = []
        ended = True
        for block in share.blocks[: share.known + share.new]:
            place = block.places[share.tier]
            if not ended and runs[-1].start + runs[-1].count == place.page:
                runs[-1] = Run(runs[-1].start, runs[-1].count + RUN_PAGES)
            else:
                runs.append(Run(place.page, RUN_PAGES))
            ended = place.ends
        return tuple(runs)

    def make_room(self, tier: int, pages: int, states: int, wanted: bool) -> bool:
        """Lets beginnings go that no row in flight shares until so many pages and states are free: the longest unused first;
        those that rows wait for last, and only if `wanted`. Whether it was enough."""
        while self._pages[tier].num_free < pages or (states and self._states[tier].num_free < states):
            idle = self._idle[tier]
            block = next((block for block in idle if not block.waiting), None)
            if block is None and wanted and idle:
                block = min(idle, key=lambda one: one.waiting)
            if block is None:
                return False
            self._remove(block, tier)
        return True

    def _remove(self, block: PromptBlock, tier: int) -> None:
        place, parent = block.places.pop(tier), block.parent
        assert not place.users and not place.followers, "a beginning that is in use"
        self._idle[tier].pop(block, None)
        self._pages[tier].release((Run(place.page, RUN_PAGES),))
        if place.state != NO_STATE:
            self._states[tier].release((Run(place.state, 1),))
        self.num_pages[tier] -= RUN_PAGES
        if parent is not None and tier in parent.places:
            parent.places[tier].followers -= 1
            if self._look(parent, tier):
                self._idle[tier].move_to_end(parent, last=False)
        forget(block)

    def _look(self, block: PromptBlock, tier: int) -> bool:
        """Whether nobody needs this block any more, but for rows in line."""
        place = block.places[tier]
        if place.users or place.followers:
            return False
        self._idle[tier][block] = None
        return True


def _live(blocks: Sequence[PromptBlock], tier: int) -> Iterator[PromptBlock]:
    """Those of a row's blocks that lie in this tier, or will."""
    for block in blocks:
        if tier not in block.places:
            return
        yield block


def _ends(blocks: Sequence[PromptBlock], known: int, new: int) -> tuple[int, ...]:
    """Behind which of the new blocks runs of pages end: where fewer than half of the rows go on, and behind the last one."""
    inner = [end for end in range(known + 1, known + new) if 2 * blocks[end].waiting < blocks[end - 1].waiting]
    return (*inner, known + new) if new else ()
