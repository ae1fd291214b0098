"""The rounds of a run: how many rows are generated, how many rounds their prompts and their new tokens take, what is in each.

Knows no plan, no rank and no rate.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from noria.plan.walk import Group, walked
from noria.step import pages_for

FILLS = (1 / 6, 1 / 2, 5 / 6)  # of the new tokens, that lie behind a row where a decode round is looked at


@dataclass(frozen=True)
class Workload:
    """What is to be generated: rows (prompts times samples), tokens of a prompt and new tokens of a row, on average.

    `total_pages`: what all rows reserve together, `longest_pages`: what the longest of them does, if somebody looked.
    `shared_tokens`: of a prompt, that another row has computed. `whole`: whether somebody looked at all rows, so that there
    is none longer.
    """

    num_rows: int
    prompt_tokens: float
    new_tokens: float
    total_pages: int | None = None
    longest_pages: int | None = None
    shared_tokens: float = 0.0
    whole: bool = False

    @property
    def computed_tokens(self) -> float:
        """Tokens of a prompt that are computed for it."""
        return self.prompt_tokens - self.shared_tokens

    @property
    def longest(self) -> int:
        """Pages of the longest row that is known."""
        return self.longest_pages or self.pages

    @property
    def pages(self) -> int:
        """Pages that a row reserves."""
        return pages_for(max(round(self.prompt_tokens + self.new_tokens), 1))

    @property
    def own_pages(self) -> int:
        """Those of them that it shares with no other row."""
        return pages_for(max(round(self.computed_tokens + self.new_tokens), 1))

    @property
    def least_pages(self) -> int:
        """Those that it cannot do without, however soon it ends."""
        return pages_for(round(self.computed_tokens) + 1)


@dataclass(frozen=True)
class Round:
    """One step of every group: rows that decode a token each, and chunks of prompts; the groups have equal parts of both.

    `context`: tokens of cache that a decoding row looks at. `chunk_context`: those that a token of a chunk looks at, on
    average. `chunk_cached`: tokens of a chunk's row that earlier steps have computed. `shared`: of the context, tokens that
    other rows of the step look at too. `lengths`: how many lengths the decoding rows have.
    `chunk_rows`: chunks; `begun`: prompts, each computed in one chunk or more. `ended`: rows that end. `reserved`: pages of all
    rows that are in flight (0: as many as there are).
    """

    rows: float
    context: float
    chunk_tokens: float = 0.0
    chunk_rows: float = 0.0
    begun: float = 0.0
    chunk_context: float = 0.0
    chunk_cached: float = 0.0
    shared: float = 0.0
    lengths: float = 1.0
    ended: float = 0.0
    reserved: float = 0.0

    @property
    def tokens(self) -> float:
        return self.rows + self.chunk_tokens

    @property
    def all_rows(self) -> float:
        """Rows that take part."""
        return self.rows + self.chunk_rows

    @property
    def sampled(self) -> float:
        return self.rows + self.begun

    def with_chunks(self, times: float) -> "Round":
        """With so many times the chunks."""
        tokens, rows, begun = (times * number for number in (self.chunk_tokens, self.chunk_rows, self.begun))
        return replace(self, chunk_tokens=tokens, chunk_rows=rows, begun=begun)


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run: those with chunks of prompts, in which other rows decode, and those that decode alone; what is in them
    on average. small: of those with chunks, as many as a rest of prompts leaves empty: they take as long as decode rounds."""

    prefill_rounds: float
    prefill: Round
    decode_rounds: float
    decode: Round
    new_tokens: float
    small: float = 0.0

    @property
    def full(self) -> Round:
        """A round with chunks, were all chunks in those that are not small."""
        return self.prefill.with_chunks(self.prefill_rounds / (self.prefill_rounds - self.small))

    def of_prefill(self, full: float, decode: float) -> float:
        """Of all rounds with chunks on average, by what it is of full ones and of decode rounds."""
        return full + (decode - full) * self.small / self.prefill_rounds

    def fills(self) -> Iterator[Round]:
        """The decode round at several fills of the cache, each for an equal part of the rounds."""
        begin = self.decode.context - self.new_tokens / 2
        return (replace(self.decode, context=begin + fill * self.new_tokens) for fill in FILLS)


@dataclass(frozen=True)
class Composing:
    """How steps are composed: of how many groups, and as walk.Group says."""

    groups: int = 1
    late: bool = False
    gathers: bool = False


PLAIN = Composing()


def decoding(rows: float, workload: Workload) -> Round:
    """A decode round of so many rows, half of their new tokens behind them."""
    context, reserved = workload.prompt_tokens + workload.new_tokens / 2, rows * workload.own_pages
    return Round(rows, context, shared=workload.shared_tokens, reserved=reserved)


def rounds_of(workload: Workload, most_rows: int, step_tokens: int, chunk: int, composing: Composing = PLAIN) -> Rounds:
    """The rounds of all rows, at most so many of them at once, with so many tokens in a group's step and in a chunk of one row.

    All groups have as many rows as the one that has most, and all rows are as long as the mean.
    """
    num_rows, prompt, new = workload.num_rows, workload.computed_tokens, workload.new_tokens
    after, groups = max(new - 1, 0.0), composing.groups
    rows, most, counted = -(-num_rows // groups), -(-most_rows // groups), max(round(prompt), 1)
    found = walked(Group(rows, most, counted, math.ceil(after), step_tokens, chunk, composing.late, composing.gathers))
    all_rows, longer = num_rows / rows, after / max(math.ceil(after), 1)  # of what was walked
    prefills, alone = found.prefill_rounds, found.decode_rounds * longer
    pieces, each = found.chunks / rows, prefills * most_rows / num_rows
    shared = workload.shared_tokens
    of_both = {
        "context": workload.prompt_tokens + new / 2,
        "shared": shared,
        "lengths": max(min(each, most_rows), 1.0) if workload.longest <= workload.pages else most_rows,
        "reserved": most_rows * workload.own_pages,
    }
    filling = Round(
        rows=found.beside * longer * all_rows / prefills,
        chunk_tokens=num_rows * prompt / prefills,
        chunk_rows=found.chunks * all_rows / prefills,
        begun=num_rows / prefills,
        chunk_context=shared + prompt / 2,
        chunk_cached=shared + prompt * (pieces - 1) / (2 * pieces),
        ended=found.early * all_rows / prefills,
        **of_both,
    )
    decoded, ended = found.alone * all_rows, (rows - found.early) * all_rows
    last = Round(
        rows=decoded / found.decode_rounds if alone else most_rows, ended=ended / alone if alone else 0.0, **of_both
    )
    return Rounds(prefills, filling, alone, last, new, found.small)
