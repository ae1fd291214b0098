"""Hidden states between layers: the same values in CPU memory as on the device, although every copy is late."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from late_streams import LateStreams
from noria import kinds
from noria.engine.activations import Embedding, InHost, OnDevice
from noria.engine.timing import Traffic
from noria.streams import CpuStreams

CPU, TOKENS, HIDDEN = torch.device("cpu"), 7, 3
NEEDED = np.array([1, 6])


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


def given():
    return torch.arange(TOKENS * HIDDEN, dtype=torch.float64).view(TOKENS, HIDDEN) + 1


def layer(hidden, number):
    return 2 * hidden + number


def visit(states, step, layers, schedule, hidden, output=None, short=None):
    """Executes a schedule as the stage does; in cell `short` memory does not suffice for whole microbatches."""
    states.begin(step, layers, hidden, output)
    start = 0
    while start < layers:
        count, begun = len(step.microbatches), start
        start = layers
        for row in kinds.load("schedules", schedule).schedule(layers - begun, count):
            for cell in row.store_cache:
                if cell != row.compute:
                    states.store(begun + cell[0], cell[1])
            for cell in row.load_cache:
                states.load(begun + cell[0], cell[1])
            if row.compute is None:
                continue
            cell = begun + row.compute[0], row.compute[1]
            part = states.take(*cell)
            if cell == short:
                short, old = None, step.microbatches
                step.microbatches = prepared([0, 1, 2, 3, 4, 5, 6, 7]).microbatches
                states.cut(old, step.microbatches)
                start = cell[0]
                break
            states.put(*cell, layer(part, cell[0]))
            for stored in row.store_cache:
                if stored == row.compute:
                    states.store(*cell)
    return states.end()


def expected(layers):
    hidden = given()
    for number in range(layers):
        hidden = layer(hidden, number)
    return hidden


@pytest.mark.parametrize("schedule", kinds.names("schedules"))
@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("borders", [[0, 7], [0, 3, 7], [0, 2, 4, 7]])
@pytest.mark.parametrize("in_host", [False, True])
@pytest.mark.parametrize("short", [None, (0, 0), (1, 1), (3, 0)])
def test_late_copies_give_the_values_of_the_layers(schedule, layers, borders, in_host, short):
    streams = LateStreams(CPU)
    states = InHost(TOKENS, TOKENS, HIDDEN, torch.float64, streams)
    embedding = Embedding(lambda first, last: given()[first:last], in_host)
    first, second = torch.full((2, TOKENS, HIDDEN), -1.0, dtype=torch.float64)
    sent = visit(states, prepared(borders), layers, schedule, embedding, first, short)
    assert sent is first
    # The rank is its own next one: what it stored is not there yet when the next visit begins.
    again = visit(states, prepared(borders), 1, schedule, first, second)
    states.stored.synchronize()
    assert torch.equal(again, layer(expected(layers), 0))
    rows = visit(states, prepared(borders), layers, schedule, embedding, None, short)
    assert torch.equal(rows, expected(layers)[NEEDED])
    states.close()


@pytest.mark.parametrize("short", [None, (1, 1)])
def test_on_the_device_the_values_are_the_same(short):
    found = visit(OnDevice(), prepared([0, 3, 7]), 3, "multi_batch", given(), None, short)
    assert torch.equal(found, expected(3))


@pytest.mark.parametrize(("borders", "loads", "stores"), [([0, 7], 1, 1), ([0, 3, 7], 4, 4)])
def test_bytes_over_the_link_are_a_load_and_a_store_a_layer_or_a_visit_of_one_microbatch(borders, loads, stores):
    traffic = Traffic()
    states = InHost(TOKENS, TOKENS, HIDDEN, torch.float64, CpuStreams(CPU), traffic)
    visit(states, prepared(borders), 4, "multi_batch", given(), torch.empty(TOKENS, HIDDEN, dtype=torch.float64))
    traffic.end_round(True)
    assert traffic.prefill["host_to_gpu"] == loads * given().nbytes
    assert traffic.prefill["gpu_to_host"] == stores * given().nbytes


def test_the_head_gets_the_rows_that_it_needs_once():
    states = InHost(TOKENS, TOKENS, HIDDEN, torch.float64, CpuStreams(CPU))
    rows, sampled, scored = states.needed(np.array([2, 6]), np.array([0, 1, 2]))
    assert rows.tolist() == [0, 1, 2, 6] and sampled.tolist() == [2, 3] and scored.tolist() == [0, 1, 2]
