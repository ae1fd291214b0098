"""Hidden states between layers: the same values in CPU memory as on the device, although every copy is late."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from counts import some
from late_streams import LateStreams
from noria import kinds
from noria.arrays import Array
from noria.borders import halved
from noria.bundle import Bundle, of_hidden
from noria.engine.activations import InHost, OnDevice
from noria.engine.timing import Traffic
from noria.ring.messages import Hidden
from noria.schedules import resumed
from noria.streams import CpuStreams

CPU, TOKENS, HIDDEN = torch.device("cpu"), 7, 3
NEEDED = np.array([1, 6])
PLAIN = [of_hidden(HIDDEN, "float64")] * 6
# Beside the hidden states up to two arrays of odd lengths, which begin, end and are handed on as they came.
IDS, FIRST = Array("ids", (3,), dtype="int32"), Array("first", (), dtype="int8")
BESIDE = [(IDS,), (FIRST, IDS), (IDS,), (), (FIRST,), (FIRST, IDS)]
BUNDLES = [Bundle((*PLAIN[0].arrays, *arrays)) for arrays in BESIDE]


@dataclass
class Part:
    first: int
    last: int


@dataclass
class Prepared:
    microbatches: list
    needed: np.ndarray
    needed_rows: torch.Tensor


def prepared(borders):
    parts = [Part(first, last) for first, last in itertools.pairwise(borders)]
    return Prepared(parts, NEEDED, torch.from_numpy(NEEDED))


def given(borders=PLAIN):
    """What goes into the first layer."""
    hidden = torch.arange(TOKENS * HIDDEN, dtype=torch.float64).view(TOKENS, HIDDEN) + 1
    beside = {
        "ids": torch.arange(3 * TOKENS, dtype=torch.int32).view(TOKENS, 3),
        "first": torch.arange(TOKENS).to(torch.int8),
    }
    return tuple({"hidden": hidden, **beside}[name] for name in borders[0].names)


def layer(part, number, borders=PLAIN):
    """Arrays that go on are handed on, the same tensors; those that begin are made of the hidden states."""
    found = dict(zip(borders[number].names, part, strict=True))
    whole = found["hidden"].remainder(100)
    begun = {"ids": whole.to(torch.int32), "first": whole[:, 0].to(torch.int8)}
    added = sum(array.reshape(len(array), -1).sum(dim=1, keepdim=True) for array in part[1:])
    hidden = 2 * found["hidden"] + number + added
    return tuple((begun | found | {"hidden": hidden})[name] for name in borders[number + 1].names)


def visit(states, step, layers, schedule, hidden, output=None, short=None, borders=PLAIN):
    """Executes a schedule as the stage does; in cell `short` memory does not suffice, twice if it is cut in two.

    Every token of every layer is computed once.
    """
    states.begin(step, range(layers), hidden, output)
    shortages, first, computed = 2, (0, 0), []
    while first is not None:
        microbatches, begun, first = step.microbatches, first, None
        for row in resumed(kinds.load("schedules", schedule).schedule(layers, len(microbatches)), begun):
            for cell in row.store_cache:
                if cell != row.compute:
                    states.store(*cell)
            for cell in row.load_cache:
                states.load(*cell)
            if row.compute is None:
                continue
            part, its = states.take(*row.compute), microbatches[row.compute[1]]
            if row.compute == short and shortages and its.last - its.first > 1:
                shortages, first, failed = shortages - 1, row.compute, short[1]
                ends = [0, *(microbatch.last for microbatch in microbatches)]
                step.microbatches = prepared([*ends[:failed], *halved(ends[failed:])]).microbatches
                states.cut(microbatches, step.microbatches, failed)
                break
            states.put(*row.compute, layer(part, row.compute[0], borders))
            computed += [(row.compute[0], token) for token in range(its.first, its.last)]
            if row.compute in row.store_cache:
                states.store(*row.compute)
    assert sorted(computed) == sorted(itertools.product(range(layers), range(TOKENS)))
    return states.end()


def expected(layers, borders=PLAIN):
    part = given(borders)
    for number in range(layers):
        part = layer(part, number, borders)
    return part


def equal(found, wanted):
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def empty(bundle):
    return tuple(torch.full((TOKENS, *a.row), -1, dtype=getattr(torch, a.dtype)) for a in bundle.arrays)


CUTS, SHORT = [[0, 7], [0, 3, 7], [0, 2, 4, 7]], [None, (0, 0), (0, 1), (1, 1), (1, 2), (3, 0), (4, 2)]
CASES = itertools.product(kinds.names("schedules"), [1, 2, 5], CUTS, [False, True], SHORT, [PLAIN, BUNDLES])


@pytest.mark.parametrize(("schedule", "layers", "cut", "in_host", "short", "borders"), some(CASES))
def test_late_copies_give_the_values_of_the_layers(schedule, layers, cut, in_host, short, borders):
    states = InHost(TOKENS, TOKENS, borders, borders[: layers + 1], LateStreams(CPU))
    embedding = Hidden(gather=lambda *tokens: tuple(a[slice(*tokens)] for a in given(borders)), in_host=in_host)
    output = empty(borders[layers])
    sent = visit(states, prepared(cut), layers, schedule, embedding, output, short, borders)
    assert sent.arrays is output
    # The rank is its own next one: what it stored is not there yet when the next visit begins.
    again = (
        visit(states, prepared(cut), 1, schedule, Hidden(output, sent.ready), empty(PLAIN[0]), None, PLAIN)
        if borders is PLAIN
        else sent
    )
    again.ready.synchronize()
    wanted = expected(layers, borders)
    assert equal(again.arrays, layer(wanted, 0) if borders is PLAIN else wanted)
    rows = visit(states, prepared(cut), layers, schedule, embedding, None, short, borders)
    assert equal(rows.arrays, tuple(array[NEEDED] for array in wanted))
    states.close()


@pytest.mark.parametrize("schedule", kinds.names("schedules"))
@pytest.mark.parametrize("short", [None, (0, 0), (0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("borders", [PLAIN, BUNDLES], ids=["hidden", "bundle"])
def test_on_the_device_the_values_are_the_same(schedule, short, borders):
    found = visit(OnDevice(), prepared([0, 3, 5, 7]), 5, schedule, Hidden(given(borders)), None, short, borders)
    assert equal(found.arrays, expected(5, borders))


@pytest.mark.parametrize("borders", [PLAIN, BUNDLES], ids=["hidden", "bundle"])
@pytest.mark.parametrize(("cut", "loads", "stores"), [([0, 7], [0], [4]), ([0, 3, 7], [0, 1, 2, 3], [1, 2, 3, 4])])
def test_bytes_over_the_link_are_a_load_and_a_store_a_layer_or_a_visit_of_one_microbatch(cut, loads, stores, borders):
    """`loads`, `stores`: the borders at which there is one."""
    traffic = Traffic()
    states = InHost(TOKENS, TOKENS, borders, borders[:5], CpuStreams(CPU), traffic)
    visit(states, prepared(cut), 4, "multi_batch", Hidden(given(borders)), empty(borders[4]), None, borders)
    traffic.end_round(True)
    nbytes = [24 + [12, 13, 12, 0, 1, 13][border] * (borders is BUNDLES) for border in range(6)]
    assert traffic.prefill["host_to_gpu"] == sum(TOKENS * nbytes[border] for border in loads)
    assert traffic.prefill["gpu_to_host"] == sum(TOKENS * nbytes[border] for border in stores)


def test_the_head_gets_the_rows_that_it_needs_once():
    states = InHost(TOKENS, TOKENS, PLAIN, PLAIN, CpuStreams(CPU))
    rows, sampled, scored = states.needed(np.array([2, 6]), np.array([0, 1, 2]))
    assert rows.tolist() == [0, 1, 2, 6] and sampled.tolist() == [2, 3] and scored.tolist() == [0, 1, 2]
