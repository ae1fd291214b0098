"""A cache in fewer bits: a row is rounded when it is written, and decoded, a page at a time, before it is attended to.

What is stored is an encoding's (encodings/), a matrix of all heads and tokens; the pages that some rows of a microbatch need
are decoded into one buffer, which any kind of attention reads as it reads a plain cache. Knows no steps and no tiers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from noria import encodings
from noria.arrays import Array
from noria.engine.batch import Attention, to_device
from noria.kernels.scoring import Scoring
from noria.models import _fused
from noria.models._rotary import Rotary
from noria.step import PAGE_TOKENS, Run, Span


@dataclass(frozen=True)
class RoundedArray:
    """An encoded array of a layer's cache: its fields [pages * 16, Hkv, ...] by name. width: of its numbers those that are
    meant (None: all)."""

    array: Array
    fields: Mapping[str, torch.Tensor]
    width: int | None = None

    def write(self, places: torch.Tensor, new: torch.Tensor) -> None:
        """Rounds new rows [T, Hkv, D] and writes them to their places [T]."""
        encodings.write_rows(self.array, self.fields, places, new)

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
    made = [queries.new_empty(len(its), *its.shape[1:] if its.dim() == 3 else (1, its.shape[1])) for its in new]
    turned = _fused.rotate_and_write(queries, rotary, new, made, torch.arange(len(queries), device=queries.device))
    for array, its in zip(arrays, made, strict=True):
        array.write(places, its)
    return turned


@dataclass(frozen=True)
class DecodedTogether:
    """Tokens `first .. last` of a microbatch, the pages [P] of their rows, and how they attend where these lie side by side."""

    first: int
    last: int
    pages: torch.Tensor
    plan: Any


Cut: TypeAlias = list[tuple[list[Span], list[Run]]]  # rows with their pages in the buffer, and the pages that lie there


class RoundedAttention:
    """A kind of attention over what lies encoded: like a module of attention/, but that keys and values are RoundedArrays.

    The pages of as many rows as find room in a buffer of `pages` pages, for the widest layer, are decoded at once.
    """

    def __init__(self, kind: Attention, pages: int, token_nbytes: int, dtype: torch.dtype, device: torch.device):
        self._kind, self._pages, self._dtype = kind, pages, dtype
        self._buffer = torch.empty(pages * PAGE_TOKENS * token_nbytes, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._buffer.nbytes

    def prepare(self, spans: list[Span], device: torch.device) -> tuple[DecodedTogether, ...]:
        """How the rows of a microbatch attend, some after others."""
        cut = cut_rows(spans, self._pages)
        ids = [np.concatenate([np.arange(run.start, run.start + run.count) for run in runs]) for _, runs in cut]
        found, first = [], 0
        for (its, _), pages in zip(cut, to_device(ids, device), strict=True):
            last = first + sum(span.count for span in its)
            found.append(DecodedTogether(first, last, pages, self._kind.prepare(its, device)))
            first = last
        return tuple(found)

    def attention(
        self,
        plan: Sequence[DecodedTogether],
        queries: torch.Tensor,
        keys: RoundedArray,
        values: RoundedArray,
        scores: Scoring,
    ) -> torch.Tensor:
        """[T, H, Dv]: as the kind gives it for the decoded numbers."""
        found = []
        for part in plan:
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


def cut_rows(spans: Sequence[Span], most: int) -> Cut:
    """The rows in parts whose pages are `most` together, each with its pages where they lie in a buffer. A run of pages that
    several rows of a part have is there once."""
    parts: Cut = []
    placed: dict[int, Run] = {}  # of the last part, by the first page of a run
    first = end = 0
    for span in spans:
        needed = _needed(span)
        new = [run for run in needed if run.start not in placed or placed[run.start].count < run.count]
        if not parts or end + sum(run.count for run in new) > most:
            parts.append(([], []))
            placed, first, end, new = {}, span.first, 0, needed
        its, runs = parts[-1]
        for run in new:
            placed[run.start] = Run(end, run.count)
            runs.append(run)
            end += run.count
        assert end <= most, f"a row of {end} pages, there is room for {most}"
        where = tuple(Run(placed[run.start].start, run.count) for run in needed)
        its.append(replace(span, first=span.first - first, runs=where))
    return parts


def _needed(span: Span) -> list[Run]:
    """The pages that hold a row's tokens, without those that are reserved for others to come."""
    found, left = [], span.length
    for run in span.runs:
        count = min(run.count, -(-left // PAGE_TOKENS))
        if count <= 0:
            break
        found.append(Run(run.start, count))
        left -= count * PAGE_TOKENS
    return found
