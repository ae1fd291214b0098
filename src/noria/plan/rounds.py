"""The rounds of a run: how many rows are generated, how many rounds their prompts and their new tokens take, what is in each.

Knows no plan, no rank and no rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from noria.step import pages_for

TRIES = 3  # to find how many rows decode beside chunks
MANY = 4  # times as many rows as are in flight: from there on a slot that gets free is filled at once
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
    `ended`: rows that end. `reserved`: pages of all rows that are in flight (0: as many as there are).
    """

    rows: float
    context: float
    chunk_tokens: float = 0.0
    chunk_rows: float = 0.0
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
        """Rows that take part, each of which is sampled."""
        return self.rows + self.chunk_rows


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run: those with chunks of prompts, in which other rows decode, and those that decode alone."""

    prefill_rounds: float
    prefill: Round
    decode_rounds: float
    decode: Round
    new_tokens: float

    def fills(self) -> Iterator[Round]:
        """The decode round at several fills of the cache, each for an equal part of the rounds."""
        begin = self.decode.context - self.new_tokens / 2
        return (replace(self.decode, context=begin + fill * self.new_tokens) for fill in FILLS)


def decoding(rows: float, workload: Workload) -> Round:
    """A decode round of so many rows, half of their new tokens behind them."""
    context, reserved = workload.prompt_tokens + workload.new_tokens / 2, rows * workload.own_pages
    return Round(rows, context, shared=workload.shared_tokens, reserved=reserved)


def rounds_of(workload: Workload, most_rows: int, round_tokens: int, chunk: int) -> Rounds:
    """The rounds of all rows, at most so many of them at once, with so many tokens in a round and in a chunk of one row.

    What rows take that decode beside chunks, a token each, is not there for chunks.
    """
    found = _rounds_of(workload, most_rows, round_tokens, round_tokens, chunk)
    for _ in range(TRIES):
        left = max(round_tokens - found.prefill.rows, round_tokens / 16)
        found = _rounds_of(workload, most_rows, round_tokens, left, chunk)
    return found


def _rounds_of(workload: Workload, most_rows: int, round_tokens: int, left: float, chunk: int) -> Rounds:
    """The same, where on average so many of a round's tokens are left for chunks.

    Rows whose prompts are computed in the first of several rounds decode in the others, and a slot that gets free has the
    next row at once: where a wave's prompts take K rounds, (K - 1) / K of the rows decode in each of them, half as many in
    the first wave, which fills the slots. Where K is more than the new tokens, rows end while others begin.
    """
    num_rows, prompt, after = workload.num_rows, workload.computed_tokens, max(workload.new_tokens - 1, 0.0)
    times = num_rows / most_rows
    waves = -(-num_rows // most_rows) if times < MANY else times  # few rows of one length end together
    rows = num_rows / waves
    pieces = max(-(-prompt // chunk), 1.0)
    filled = _rounds(most_rows * prompt, round_tokens, left, pieces)
    rest = num_rows - most_rows * (num_rows // most_rows) if times < MANY else 0
    prefills = waves * filled if not rest else (waves - 1) * filled + _rounds(rest * prompt, round_tokens, left, pieces)
    each = prefills / waves
    beside = min(each - 1, after)  # rounds of chunks in which a row of the first wave decodes, at most
    first = after - after * (after + 1) / (2 * each) if each - 1 > after else beside / 2  # of the first wave
    riding = rows * (first + (waves - 1) * beside)
    alone = waves * max(after - beside, 0.0) + beside
    later = max(waves * rows * after - riding, 0.0)
    context = workload.prompt_tokens + workload.new_tokens / 2
    begun = rows * waves / prefills
    lengths = max(min(each, rows), 1.0) if workload.longest <= workload.pages else rows
    early = rows * (waves - 1 + max(1 - after / each, 0.0) * (each - 1 > after))  # they end while others begin
    shared = workload.shared_tokens
    cached = shared + prompt * (pieces - 1) / (2 * pieces)
    of_both = {"context": context, "shared": shared, "lengths": lengths, "reserved": rows * workload.own_pages}
    filling = Round(
        rows=riding / prefills,
        chunk_tokens=begun * prompt,
        chunk_rows=begun * pieces,
        chunk_context=shared + prompt / 2,
        chunk_cached=cached,
        ended=early / prefills,
        **of_both,
    )
    ended = (rows * waves - early) / alone if alone else 0.0
    last = Round(rows=later / alone if alone else rows, ended=ended, **of_both)
    return Rounds(prefills, filling, alone, last, workload.new_tokens)


def _rounds(tokens: float, round_tokens: int, left: float, pieces: float) -> float:
    """Rounds in which prompts of so many tokens are computed: whole ones, and what decoding rows push into a further one, which
    is little more than a decode round."""
    return max(-(-tokens // round_tokens), tokens / left, pieces, 1.0)
