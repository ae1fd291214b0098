"""Logits in pieces: which rows, how many at a time, how many sizes a device sees."""

import pytest
import torch

from noria.engine.logits import Logits
from noria.limits import LOGITS_ROWS

VOCAB, SIZE = 7, 3
DRAW = torch.Generator().manual_seed(0)
# Whole numbers: their sums are the same in any order, which on some processors depends on the number of rows.
WEIGHT = torch.randint(-99, 100, (VOCAB, SIZE), generator=DRAW).double()
HIDDEN = torch.randint(-99, 100, (2000, SIZE), generator=DRAW).double()


def of(rows, device="cpu", seen=None, most=10**9):
    """The logits of these rows, put together; what the head was given, and words. More than `most` rows are too many for it."""
    seen, said = [] if seen is None else seen, []

    def head(hidden):
        seen.append(len(hidden[0]))
        if len(hidden[0]) > most:
            raise torch.OutOfMemoryError
        return hidden[0] @ WEIGHT.T

    logits = Logits(head, torch.device(device), said.append)
    pieces = logits.of((HIDDEN,), torch.tensor(rows), lambda chunk, found: (range(len(rows))[chunk], found))
    assert [place for places, _ in pieces for place in places] == [*range(len(rows))]
    return torch.cat([found for _, found in pieces]) if pieces else torch.zeros(0, VOCAB), said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [0, 1, 2, 17, LOGITS_ROWS - 1, LOGITS_ROWS, LOGITS_ROWS + 1, 3 * LOGITS_ROWS + 5])
def test_each_row_has_the_logits_of_its_hidden_state(device, count):
    rows = torch.randperm(len(HIDDEN), generator=DRAW)[:count].tolist()
    found, said = of(rows, device)
    assert torch.equal(found, HIDDEN[rows] @ WEIGHT.T if rows else torch.zeros(0, VOCAB)) and not said


def test_a_gpu_sees_a_few_numbers_of_rows_and_a_cpu_those_that_there_are():
    sizes = {"cpu": [], "cuda": []}
    for count in range(1, LOGITS_ROWS + 1):
        for device, seen in sizes.items():
            of([0] * count, device, seen)
    assert sizes["cpu"] == [*range(1, LOGITS_ROWS + 1)]
    assert len(set(sizes["cuda"])) <= 24 and max(sizes["cuda"]) == LOGITS_ROWS
    assert all(own <= size <= max(2 * own, 8) for own, size in enumerate(sizes["cuda"], 1))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_memory_is_short_there_are_fewer_rows_at_a_time(device):
    found, said = of([*range(100)], device, seen := [], most=13)
    assert torch.equal(found, HIDDEN[:100] @ WEIGHT.T)
    assert said == [f"out of memory: logits of {rows} rows at a time from now on" for rows in (50, 25, 12)]
    assert max(seen[3:]) <= 12
