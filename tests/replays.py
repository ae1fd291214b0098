"""A layer over a cache in fewer bits, captured once and replayed in the steps that follow, beside one that is queued anew."""

import numpy as np
import torch

from item_cases import ragged
from noria.arrays import stored
from noria.attention import items
from noria.engine.batch import Microbatch
from noria.engine.layer_cache import LayerCache
from noria.engine.parameters import FIELD_DTYPES
from noria.engine.rounding import RoundedArray, RoundedAttention
from noria.kernels import attend
from noria.step import PAGE_TOKENS

HELD = [
    0,
    61,
    62,
    300,
    1022,
    1500,
]  # keys of rows before the first step: they come to borders of pages, blocks, sections
NOBODY, STEPS, BLOCK = 2, 4, 64
FIRST = np.cumsum(
    [0] + [-(-(held + STEPS) // BLOCK) * BLOCK for held in HELD]
)  # cache rows; the last: of a page of nobody
TOKENS = len(HELD) + NOBODY


def rows_of(step):
    """The rows of a step, and where their tokens belong [T]; rows of nobody are all in one place."""
    held = [count + step for count in HELD]
    runs = [[(first, room)] for first, room in zip(FIRST, np.diff(FIRST), strict=False)]
    lengths, spare = [count + 1 for count in held] + [1] * NOBODY, [[(FIRST[-1], PAGE_TOKENS)]] * NOBODY
    return ragged([1] * TOKENS, lengths, runs + spare), np.array([*(FIRST[:-1] + held), *[FIRST[-1]] * NOBODY])


class Layer:
    """What a step of one layer reads and writes: its cache, and where queries, new keys and values and their places lie."""

    def __init__(self, heads, form, dtype, device):
        self.entry, self.kind = attend.arrays(heads, form), RoundedAttention(items, 1, 1, dtype, device, in_tiles=True)
        rows = int(FIRST[-1]) + PAGE_TOKENS
        self.fields = {
            one.name: torch.zeros(rows, *one.row, dtype=FIELD_DTYPES[one.computed("")], device=device)
            for one in stored(self.entry)
        }
        draw = torch.Generator().manual_seed(0)
        for array in self.entry:
            its = RoundedArray(array, {name: self.fields[one.name] for name, one in array.fields.items()})
            its.write(
                torch.arange(rows, device=device), torch.randn(rows, *array.row, generator=draw).to(device, dtype)
            )
        shapes = (heads.num_heads, heads.dim), *(array.row for array in self.entry)
        self.new = [torch.zeros(TOKENS, *shape, dtype=dtype, device=device) for shape in shapes]
        self.places = torch.zeros(TOKENS, dtype=torch.int64, device=device)
        self.attended = torch.zeros(TOKENS, heads.num_heads, heads.width, dtype=dtype, device=device)

    def attend(self, plan, window):
        queries, key, value = self.new
        its = Microbatch(0, TOKENS, self.places, self.places, None, plan, None)
        cache = LayerCache(self.kind, its, self.fields, self.entry)
        found = cache.attend(queries, scale=queries.shape[-1] ** -0.5, window=window, key=key, value=value)
        self.attended.copy_(found)


@torch.inference_mode()
def differences(heads, form, dtype, device, capturer, window=None):
    """What differs, by step: the rows' attended numbers, and what the cache has but for the page of nobody. And the captures."""
    anew, again = (Layer(heads, form, dtype, device) for _ in range(2))
    held, replay, found, captures = again.kind.held(device), None, [], 0
    for step in range(STEPS):
        rows, places = rows_of(step)
        draw = torch.Generator().manual_seed(step + 1)
        for one, other in zip(anew.new, again.new, strict=True):
            one.copy_(torch.randn(one.shape, generator=draw))
            other.copy_(one)
        for layer in (anew, again):
            layer.places.copy_(torch.from_numpy(places))
        anew.attend(anew.kind.of_rows(rows, device), window)
        if not held.take(again.kind.of_rows(rows, device)) or replay is None:
            replay, captures = capturer.capture(lambda: again.attend(held, window)), captures + 1
        again.attended.fill_(torch.nan)
        replay()
        its, expected = (layer.attended[: len(HELD)] for layer in (again, anew))
        assert expected.isfinite().all()
        pairs = {"attended": (its, expected)}
        pairs |= {name: (its[: FIRST[-1]], anew.fields[name][: FIRST[-1]]) for name, its in again.fields.items()}
        bits = {name: [one.contiguous().view(torch.uint8) for one in its] for name, its in pairs.items()}
        found += [(step, name) for name, its in bits.items() if not torch.equal(*its)]
    return found, captures
