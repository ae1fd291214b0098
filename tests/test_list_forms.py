"""Lists of one form: whatever they are filled up with, what is computed stays the same."""

import numpy as np
import pytest
import torch

import items_twin
from counts import count
from noria.kernels import forms, lists, placed
from noria.kernels.work import NONE, Item, Merge, Packing
from test_lists import RandomRows, decoding, random_packing


def shape_of(work):
    """What a launch of these lists is given beside the lists."""
    return [
        (len(work.order), len(work.pieces), work.slots),
        *(
            ([(len(its.items), its.tile, its.many, its.partial) for its in w.launches], len(w.merges))
            for w in work.waves
        ),
    ]


@pytest.mark.parametrize("seed", range(count(300)))
def test_lists_in_a_form_that_holds_them_compute_the_same(seed):
    choose = np.random.default_rng(seed)
    packing = random_packing(choose, None)
    works = {}
    while len(works) < 3 or max(map(len, works.values())) < 2:  # steps of as many queries
        work = lists.make(RandomRows(choose, None).rows(), packing)
        works.setdefault(len(work.order), []).append(work)
    first, second = next(its for its in works.values() if len(its) > 1)[:2]
    form = forms.joined(forms.joined(None, first), second)
    assert forms.joined(form, first) == form == forms.joined(form, second)
    for work in (first, second):
        padded = forms.padded(work, form)
        assert items_twin.execute(padded, items_twin.Keys()) == items_twin.execute(work, items_twin.Keys())
        assert shape_of(padded) == shape_of(forms.padded(first, form))
        in_memory = placed.to_device(padded, torch.device("cpu"))
        assert in_memory.packed.equal(placed.packed(padded)) and in_memory.order.tolist() == work.order.tolist()
        for (launches, merges), wave in zip(in_memory.waves, padded.waves, strict=True):
            assert merges.shape[1] == len(Merge) and merges.tolist() == wave.merges.tolist()
            for launch, its_items in launches:
                assert its_items.shape[1] == len(Item) and its_items.tolist() == launch.items.tolist()


def test_a_form_grows_in_steps():
    rooms = [forms._room(0, needed) for needed in (0, 1, 16, 17, 100, 130, 1000, 1025)]
    assert rooms == [0, 16, 16, 32, 112, 160, 1024, 1280] and forms._room(2048, 1025) == 2048


@pytest.mark.parametrize("beginnings", [1, 3])
@pytest.mark.parametrize("programs", [1, 132, 264])
def test_rows_of_nobody_take_the_places_of_rows_that_share_a_beginning(programs, beginnings):
    """A step is padded with rows of one key: what was recorded for its size serves it while rows end."""
    packing, size, shared = Packing(4, 8, programs), 96, [1984] * beginnings
    form = None
    for rows in (96, 95, 70, 60):  # as long as tiles are as wide
        lengths = [2100 + row if row < rows else 1 for row in range(size)]
        prefixes = [row % beginnings if row < rows else NONE for row in range(size)]
        work = lists.make(decoding(lengths, 1984, prefixes, shared), packing)
        form = form or forms.joined(None, work)
        assert forms.joined(form, work) == form, rows
        assert len(work.waves) == 2 and sum(len(its.items) for its in work.waves[1].launches) == size
