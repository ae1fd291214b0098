"""Attention by the lists of attention/items.py, executed plainly in torch: any device, dtype and head size.

What a run computes by it has gone through the lists, the runs of pages that they read and the order of their parts.
T queries, H heads, Hkv key heads, G = H / Hkv, V width of a value; n queries of an item.
"""

import torch

from noria.attention import items
from noria.kernels import work
from noria.kernels.scoring import HeadShape
from noria.kernels.work import NONE, SECTION, Item, Merge, Packing
from noria.step import PAGE_TOKENS

FAR = -1e38  # a maximum of no keys
PROGRAMS = 30  # so few that most rows are not split, and the longest are
WIDEST = work.WIDE_TILE


def refuses(device, dtype, heads, scored):
    return ""


prepare, of_rows, held = items.prepare, items.of_rows, items.held


def attention(plan, queries, key_cache, value_cache, scores):
    key_cache, value_cache = (plain(cache, queries.dtype) for cache in (key_cache, value_cache))
    heads = HeadShape.of(queries, key_cache, value_cache)
    packing = Packing(heads.group, heads.num_key_heads, PROGRAMS, widest=WIDEST, window=scores.window)
    lists = plan.of(heads, scores.window, lambda: packing)
    return Execution(lists, queries, key_cache, value_cache, scores).run()


def plain(cache, dtype):
    """[rows, Hkv, D]: all of a cache, decoded where it is coded, as it is where `refuses_coded` is set to refuse nothing."""
    if isinstance(cache, torch.Tensor):
        return cache
    whole = torch.empty(cache.shape, dtype=dtype)
    cache.decode(torch.arange(len(whole) // PAGE_TOKENS), whole)
    return whole


class Execution:
    """One call. A partial result is sums [n, H, V], maxima [n, H] and weights [n, H]."""

    def __init__(self, lists, queries, keys, values, scores):
        self.lists, self.work, self.scores = lists, lists.work, scores
        self.queries, self.keys, self.values = queries, keys, values
        self.group = queries.shape[1] // keys.shape[1]
        self.slots = self.empty(lists.work.slots)
        self.attended = queries.new_full((*queries.shape[:2], values.shape[2]), torch.nan)
        self.order, self.positions = lists.order, lists.positions

    def empty(self, count):
        heads, kind = self.queries.shape[1], torch.promote_types(self.queries.dtype, torch.float32)
        one = torch.zeros(count, heads, dtype=kind)
        return torch.zeros(count, heads, self.values.shape[2], dtype=kind), torch.full_like(one, FAR), one

    def run(self):
        for launches, merges in self.lists.waves:
            for _, its_items in launches:
                for item in its_items[its_items[:, Item.COUNT] > 0].tolist():
                    self.item(item)
            for merge in merges[merges[:, Merge.PLACE] >= 0].tolist():
                self.merge(merge)
        return self.attended

    def load(self, slot, count):
        return self.empty(count) if slot == NONE else tuple(part[slot : slot + count].clone() for part in self.slots)

    def store(self, slot, partial):
        for held, part in zip(self.slots, partial, strict=True):
            held[slot : slot + len(part)] = part

    def item(self, item):
        count, places = item[Item.COUNT], slice(item[Item.FIRST], item[Item.FIRST] + item[Item.COUNT])
        total, section = self.load(item[Item.TOTAL_FROM], count), self.load(item[Item.SECTION_FROM], count)
        for row, at, keys, _ in self.lists.pieces[item[Item.PIECE] : item[Item.LAST_PIECE]].tolist():
            low, high = max(at, item[Item.START]), min(at + keys, item[Item.STOP])
            if low % SECTION == 0:
                total, section = fold(total, section), self.empty(count)
            if low < high:
                section = fold(section, self.meet(places, low, high, row - at))
        if item[Item.SECTION_TO] == NONE:
            self.finish(places, fold(total, section))
            return
        self.store(item[Item.SECTION_TO], section)
        if item[Item.TOTAL_TO] != NONE:
            self.store(item[Item.TOTAL_TO], total)

    def meet(self, places, low, high, zeroth):
        """The queries' partial result of the keys at positions `low .. high`."""
        held, position = torch.arange(low, high), self.positions[places][:, None, None]
        keys, values = (
            cache[zeroth + low : zeroth + high].repeat_interleave(self.group, dim=1).to(self.slots[0].dtype)
            for cache in (self.keys, self.values)
        )
        asked = self.queries[self.order[places].long()].to(keys.dtype) * self.scores.scale
        found = torch.einsum("nhd,khd->nhk", asked, keys)
        if self.scores.soft_cap is not None:
            found = torch.tanh(found / self.scores.soft_cap) * self.scores.soft_cap
        seen = held <= position
        if self.scores.window is not None:
            seen = seen & (held > position - self.scores.window)
        found = found.masked_fill(~seen, -torch.inf)
        top = found.amax(-1).clamp(min=FAR)
        weights = torch.exp(found - top[:, :, None])
        return torch.einsum("nhk,khv->nhv", weights, values), top, weights.sum(-1)

    def merge(self, merge):
        parts = [merge[Merge.FIRST] + number * merge[Merge.STRIDE] for number in range(merge[Merge.COUNT])]
        partial = self.empty(1)
        for slot in (merge[Merge.TOTAL], merge[Merge.SECTION], *parts):
            partial = fold(partial, self.load(slot, 1))
        if merge[Merge.TO] == NONE:
            self.finish(slice(merge[Merge.PLACE], merge[Merge.PLACE] + 1), partial)
        else:
            self.store(merge[Merge.TO], partial)

    def finish(self, places, partial):
        if self.scores.sinks is not None:
            none, top, one = self.empty(len(partial[1]))
            partial = fold(partial, (none, top * 0 + self.scores.sinks.to(top), one + 1))
        self.attended[self.order[places].long()] = (partial[0] / partial[2][:, :, None]).to(self.attended.dtype)


def fold(one, other):
    top = torch.maximum(one[1], other[1])
    old, new = torch.exp(one[1] - top), torch.exp(other[1] - top)
    return one[0] * old[:, :, None] + other[0] * new[:, :, None], top, one[2] * old + other[2] * new
