"""The rounds of a run against a simulation of its steps, token by token."""

import random

import pytest

from noria.plan.rounds import Workload, rounds_of


def simulated(num_rows, prompt, new, most_rows, step):
    """Rounds with and without chunks of prompts, and rows that decode in those with chunks and in the others, all together.

    A step has a token of each row that decodes, then chunks of prompts; a row ends with its last token.
    """
    waiting, filling, decoding = num_rows, [], []
    rounds, beside = {"prefill": 0, "decode": 0}, {"prefill": 0, "decode": 0}
    while waiting or filling or decoding:
        left, begun = step - len(decoding), []
        while left > 0 and (filling or (waiting and len(filling) + len(decoding) + len(begun) < most_rows)):
            if not filling:
                filling, waiting = [prompt], waiting - 1
            taken = min(left, filling[0])
            left -= taken
            filling[0] -= taken
            if not filling[0]:
                begun.append(new - 1)
                filling = []
        phase = "prefill" if left < step - len(decoding) else "decode"
        rounds[phase] += 1
        beside[phase] += len(decoding)
        decoding = [after - 1 for after in decoding if after > 1] + [after for after in begun if after]
    return rounds, beside


def cases():
    draw = random.Random(7)
    for _ in range(40):
        rows, prompt, new = (int(2 ** draw.uniform(*bits)) for bits in ((4, 9), (4, 9), (2, 7)))
        most = max(int(rows * 2 ** -draw.uniform(0, 3)), 1)
        yield rows, prompt, new, most, most + int(2 ** draw.uniform(7, 13))


@pytest.mark.parametrize("case", list(cases()))
def test_rounds_and_rows_beside_chunks_are_those_of_a_run(case):
    rows, prompt, new, most, step = case
    rounds, beside = simulated(rows, prompt, new, most, step)
    found = rounds_of(Workload(rows, prompt, new), most, step, step)
    assert found.prefill_rounds == pytest.approx(rounds["prefill"], rel=0.15, abs=max(1.5, 0.03 * sum(rounds.values())))
    assert found.prefill_rounds + found.decode_rounds == pytest.approx(sum(rounds.values()), rel=0.2, abs=2)
    decoded = found.prefill_rounds * found.prefill.rows + found.decode_rounds * found.decode.rows
    assert decoded == pytest.approx(sum(beside.values()), rel=0.01)


def test_a_prompts_chunks_leave_room_for_the_rows_that_decode():
    full, half = (rounds_of(Workload(1000, 64, 1000), 1000, step, step).prefill_rounds for step in (100_000, 128))
    assert full == 1 and half > 1.5 * 500


def test_rows_that_end_while_others_begin_leave_few_to_decode_alone():
    found = rounds_of(Workload(512, 64, 32), 512, 512, 512)
    rounds, beside = simulated(512, 64, 32, 512, 512)
    assert found.decode_rounds == pytest.approx(rounds["decode"], rel=0.1)
    assert found.decode.rows == pytest.approx(beside["decode"] / rounds["decode"], rel=0.15)
