"""A cache in fewer bits: a row is rounded when it is written, and decoded as it is attended to, or a page at a time before.

What is stored is an encoding's (encodings/), a matrix of all heads and tokens. A kind of attention may decode it itself; else
the pages that some rows of a microbatch need are decoded into one buffer, which any kind reads as it reads a plain cache.
Knows no steps and no tiers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from noria import encodings
from noria.arrays import Array
from noria.attention._ragged import ragged
from noria.engine.batch import Attention, to_device
from noria.engine.rings import made_apart
from noria.kernels.coded import Coded
from noria.kernels.scoring import Scoring
from noria.kernels.work import NONE, RaggedRows
from noria.limits import RUN_PAGES
from noria.models._rotary import Rotary
from noria.step import PAGE_TOKENS, Run, Span

BLOCK = RUN_PAGES * PAGE_TOKENS  # tokens at whose multiples runs begin
QUERIES = 32  # of a row, that read a key together: of a tile of 128 rows, where 4 heads share keys
TIMES_READ = 3  # so often keys are decoded as they are read; where they are read 4 times, once before is faster


@dataclass(frozen=True)
class RoundedArray(Coded):
    """An encoded array of a layer's cache: its fields [pages * 16, Hkv, ...] by name. width: of its numbers those that are
    meant (None: all)."""

    width: int | None = None

    def write(self, places: torch.Tensor, new: torch.Tensor) -> None:
        """Rounds new rows [T, Hkv, D] and writes them to their places [T]."""
        encodings.write_rows(places, (self.array, self.fields, new))

    def decode(self, pages: torch.Tensor, into: torch.Tensor) -> None:
        """Decodes pages [P], one after another, into [P * 16, Hkv, D]."""
        encodings.decode_pages(self.array, self.fields, pages, into)


def rotate_and_round(
    queries: torch.Tensor,
    rotary: Rotary,
    new: Sequence[torch.Tensor],
    arrays: Sequence[RoundedArray],
    places: torch.Tensor,
) -> torch.Tensor:
    """Like _fused.rotate_and_write: queries [T, H, D] as they attend, once the `new` of each token is rounded and written."""
    turned, made = made_apart(queries, rotary, dict(enumerate(new)))
    its = ((array.array, array.fields, its) for array, its in zip(arrays, made.values(), strict=True))
    encodings.write_rows(places, *its)
    return turned


@dataclass(frozen=True)
class DecodedTogether:
    """Tokens `first .. last` of a microbatch, the pages [P] of their rows, and how they attend where these lie side by side."""

    first: int
    last: int
    pages: torch.Tensor
    plan: Any


Parts: TypeAlias = tuple[DecodedTogether, ...]


@dataclass
class RoundedRows:
    """The rows of a microbatch, some after others; made when the first layer of a window asks for them."""

    make: Callable[[int | None], Parts]
    made: dict[int | None, Parts] = field(default_factory=dict)

    def of(self, window: int | None) -> Parts:
        """For layers whose queries see so many tokens: what is behind them is not decoded."""
        if window not in self.made:
            self.made[window] = self.make(window)
        return self.made[window]


@dataclass(frozen=True)
class SomeRows:
    """Rows `rows` whose pages find room together, the ids of these pages, and the first page there of each of their `runs`."""

    rows: slice
    ids: np.ndarray
    runs: slice
    places: np.ndarray


class RoundedAttention:
    """A kind of attention over what lies encoded: like a module of attention/, but that keys and values are RoundedArrays.

    The pages of as many rows as find room in a buffer of `pages` pages, for the widest layer, are decoded at once. in_tiles: the
    kind decodes what it attends to itself, which takes less where a row's queries read its keys a few times.
    """

    def __init__(
        self,
        kind: Attention,
        pages: int,
        token_nbytes: int,
        dtype: torch.dtype,
        device: torch.device,
        in_tiles: bool = False,
    ):
        self._kind, self._pages, self._dtype, self._in_tiles = kind, pages, dtype, in_tiles
        self._buffer = torch.empty(pages * PAGE_TOKENS * token_nbytes, dtype=torch.uint8, device=device)
        if hasattr(kind, "of_rows"):
            self.of_rows = self._of_rows
        if in_tiles:
            self.held = kind.held

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._buffer.nbytes

    def prepare(self, spans: list[Span], device: torch.device) -> Any:
        """How the rows of a microbatch attend."""
        if hasattr(self._kind, "of_rows"):
            return self._of_rows(ragged(spans), device)
        return RoundedRows(lambda window: self._of_spans([_seen(span, window) for span in spans], device))

    def _of_rows(self, rows: RaggedRows, device: torch.device) -> Any:
        """The same, of rows that are arrays already: RoundedRows, or a plan of the kind's own."""
        if self._in_tiles and _times_read(rows) <= TIMES_READ:
            return self._kind.of_rows(rows, device)
        return RoundedRows(lambda window: self._of_arrays(rows if window is None else _in_view(rows, window), device))

    def _of_spans(self, spans: list[Span], device: torch.device) -> Parts:
        runs = [(row, run.start, count) for row, span in enumerate(spans) for run, count in _needed(span)]
        owners, starts, pages = (np.array(column, np.int64) for column in zip(*runs, strict=True))

        def plan(some: SomeRows) -> object:
            its, first = spans[some.rows], spans[some.rows.start].first
            placed = map(Run, some.places.tolist(), pages[some.runs].tolist())
            counts = np.bincount(owners[some.runs] - some.rows.start).tolist()
            moved = [
                replace(span, first=span.first - first, runs=tuple(islice(placed, count)))
                for span, count in zip(its, counts, strict=True)
            ]
            return self._kind.prepare(moved, device)

        counts = np.array([span.count for span in spans], np.int64)
        return self._planned(cut_rows(owners, starts, pages, self._pages), counts, plan, device)

    def _of_arrays(self, rows: RaggedRows, device: torch.device) -> Parts:
        owners = np.repeat(np.arange(len(rows.counts)), np.diff(rows.offsets))
        tokens = np.clip(rows.lengths[owners] - rows.run_positions, 0, rows.run_keys)
        cut = cut_rows(owners, rows.run_rows // PAGE_TOKENS, -(-tokens // PAGE_TOKENS), self._pages)

        def plan(some: SomeRows) -> object:
            counts, lengths, prefixes = (one[some.rows] for one in (rows.counts, rows.lengths, rows.prefixes))
            offsets = rows.offsets[some.rows.start : some.rows.stop + 1] - some.runs.start
            runs = some.places * PAGE_TOKENS, rows.run_positions[some.runs], rows.run_keys[some.runs]
            moved = RaggedRows(counts, lengths, offsets, *runs, prefixes, rows.shared, rows.parents)
            return self._kind.of_rows(moved, device)

        return self._planned(cut, rows.counts, plan, device)

    def _planned(
        self, cut: list[SomeRows], counts: np.ndarray, plan: Callable[[SomeRows], object], device: torch.device
    ) -> Parts:
        ends = np.concatenate([[0], np.cumsum(counts)]).tolist()
        pages = to_device([some.ids for some in cut], device)
        return tuple(
            DecodedTogether(ends[some.rows.start], ends[some.rows.stop], its, plan(some))
            for some, its in zip(cut, pages, strict=True)
        )

    def attention(
        self,
        plan: Any,
        queries: torch.Tensor,
        keys: RoundedArray,
        values: RoundedArray,
        scores: Scoring,
    ) -> torch.Tensor:
        """[T, H, Dv]: as the kind gives it for the decoded numbers."""
        if not isinstance(plan, RoundedRows):
            return self._kind.attention(plan, queries, keys, values, scores)
        found = []
        for part in plan.of(scores.window):
            rows = len(part.pages) * PAGE_TOKENS
            its_keys, its_values = self._views(rows, keys.array, values.array)
            keys.decode(part.pages, its_keys)
            if values.array != keys.array:
                values.decode(part.pages, its_values)
            asked = queries[part.first : part.last]
            found.append(self._kind.attention(part.plan, asked, its_keys, its_values[..., : values.width], scores))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _views(self, rows: int, *arrays: Array) -> list[torch.Tensor]:
        """Where so many rows of each of these arrays are decoded, one array behind the other; one that is named again is there
        once."""
        views: dict[Array, torch.Tensor] = {}
        start = 0
        for array in dict.fromkeys(arrays):
            nbytes = rows * prod(array.row) * self._dtype.itemsize
            heads = array.row if len(array.row) > 1 else (1, *array.row)
            views[array] = self._buffer[start : start + nbytes].view(self._dtype).view(rows, *heads)
            start += nbytes
        return [views[array] for array in arrays]


def cut_rows(owners: np.ndarray, starts: np.ndarray, pages: np.ndarray, most: int) -> list[SomeRows]:
    """The rows of runs [K] of pages in parts whose pages are `most` together; a run that several rows of a part have is there
    once. owners: the row of each run, ascending; starts, pages: its first page, and how many of them hold tokens."""
    _, numbers = np.unique(starts, return_inverse=True)
    longest = np.zeros(numbers.max() + 1, np.int64)
    np.maximum.at(longest, numbers, pages)
    before, parts, row, num_rows = _before(owners, starts), list[SomeRows](), 0, int(owners[-1]) + 1
    while row < num_rows:
        begin = int(np.searchsorted(owners, row))
        new = np.where(before[begin:] < row, longest[numbers[begin:]], 0)
        fitting = int(np.searchsorted(np.cumsum(new), most, side="right"))
        last = num_rows if fitting == len(new) else int(owners[begin + fitting])
        assert last > row, f"a row of {new[owners[begin:] == row].sum()} pages, there is room for {most}"
        stop = int(np.searchsorted(owners, last))
        parts.append(_placed(slice(row, last), slice(begin, stop), starts[begin:stop], new[: stop - begin]))
        row = last
    return parts


def _times_read(rows: RaggedRows) -> float:
    """How many times the queries of the rows read a key, on average."""
    return float(rows.lengths @ -(-rows.counts // QUERIES) / rows.lengths.sum())


def _before(owners: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[K] the last earlier row that has the same run; -1 for none."""
    order = np.argsort(starts, kind="stable")
    again = np.flatnonzero(starts[order][1:] == starts[order][:-1])
    before = np.full(len(owners), -1)
    before[order[again + 1]] = owners[order[again]]
    return before


def _placed(rows: slice, runs: slice, starts: np.ndarray, new: np.ndarray) -> SomeRows:
    """The rows with their pages side by side: `new` of each run that no row before has."""
    ends = np.cumsum(new)
    _, first, same = np.unique(starts, return_index=True, return_inverse=True)
    ids = np.repeat(starts - (ends - new), new) + np.arange(ends[-1])
    return SomeRows(rows, ids, runs, (ends - new)[first][same])


def _in_view(rows: RaggedRows, window: int) -> RaggedRows:
    """The rows without the blocks of keys that none of their queries sees. None is a prefix's any more."""
    seen = np.maximum(rows.lengths - rows.counts - window + 1, 0) // BLOCK * BLOCK
    owners = np.repeat(np.arange(len(rows.counts)), np.diff(rows.offsets))
    behind = np.clip(seen[owners] - rows.run_positions, 0, rows.run_keys)
    kept = behind < rows.run_keys
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners[kept], minlength=len(rows.counts)))])
    runs = (rows.run_rows + behind)[kept], (rows.run_positions + behind)[kept], (rows.run_keys - behind)[kept]
    none = np.zeros(0, np.int64)
    return RaggedRows(rows.counts, rows.lengths, offsets, *runs, np.full(len(rows.counts), NONE), none, none)


def _seen(span: Span, window: int | None) -> Span:
    """The row without the pages that none of its queries sees; to a window it is all one where tokens are counted from."""
    behind = 0 if window is None else max(span.length - span.count - window + 1, 0) // PAGE_TOKENS
    runs, left = [], behind
    for run in span.runs:
        if run.count > left:
            runs.append(Run(run.start + left, run.count - left))
        left = max(left - run.count, 0)
    return replace(span, length=span.length - behind * PAGE_TOKENS, runs=tuple(runs))


def _needed(span: Span) -> Iterator[tuple[Run, int]]:
    """The runs that hold a row's tokens, with how many of their pages do: others are reserved for tokens to come."""
    left = span.length
    for run in span.runs:
        count = min(run.count, -(-left // PAGE_TOKENS))
        if count <= 0:
            return
        yield run, count
        left -= count * PAGE_TOKENS
