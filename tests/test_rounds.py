import pytest

from noria.plan.rounds import Workload, rounds_of


def walked(num_rows, most, prompt, new, budget):
    """(rounds with chunks, decoded tokens in them, rounds, decoded tokens) of rows that are begun one after another."""
    waiting, running, found = [prompt] * num_rows, [], [0, 0, 0, 0]
    while waiting or running:
        before = len(running)
        left = room = budget - before  # a token of each row that decodes
        found[3] += before
        running = [row - 1 for row in running if row > 1]
        free = most - before
        while waiting and free and left >= prompt:
            waiting.pop()
            left, free = left - prompt, free - 1
            running.append(new - 1)
        chunked = left < room
        found[2] += 1
        found[0], found[1] = found[0] + chunked, found[1] + before * chunked
    return found


@pytest.mark.parametrize("budget", [512, 1024, 2048, 4096, 8192])
def test_the_rounds_of_one_wave_are_those_of_a_walk_through_them(budget):
    found = rounds_of(Workload(64, 128, 20), 64, budget, 4096)
    chunked, _, rounds, decoded = walked(64, 64, 128, 20, budget)
    assert found.prefill_rounds == pytest.approx(chunked, rel=0.2, abs=1)
    assert found.prefill_rounds + found.decode_rounds == pytest.approx(rounds, rel=0.11)
    total = found.prefill.rows * found.prefill_rounds + found.decode.rows * found.decode_rounds
    assert total == pytest.approx(decoded) == 64 * 19


@pytest.mark.parametrize(("most", "budget"), [(32, 4096), (32, 1024), (22, 1024)])
def test_later_waves_begin_where_earlier_rows_end(most, budget):
    found = rounds_of(Workload(64, 128, 20), most, budget, 4096)
    chunked, _, rounds, _ = walked(64, most, 128, 20, budget)
    assert found.prefill_rounds + found.decode_rounds == pytest.approx(rounds, rel=0.06)
    assert found.prefill_rounds == pytest.approx(chunked, abs=2)


def test_a_prompt_longer_than_a_chunk_takes_as_many_rounds_as_it_has_pieces_and_looks_at_the_earlier_ones():
    found = rounds_of(Workload(1, 1000, 5), 1, 8192, 250)
    assert found.prefill_rounds == 4 and found.prefill.chunk_tokens == 250
    assert found.prefill.chunk_cached == pytest.approx((0 + 250 + 500 + 750) / 4)
    assert rounds_of(Workload(1, 1000, 5), 1, 8192, 1000).prefill.chunk_cached == 0


def test_what_prompts_share_is_looked_at_and_not_computed():
    found, own = (rounds_of(Workload(64, 1000, 20, shared_tokens=shared), 64, 4096, 4096) for shared in (900, 0))
    assert found.prefill_rounds * found.prefill.chunk_tokens == pytest.approx(64 * 100)
    assert found.prefill.chunk_context == 900 + 100 / 2 and found.decode.context == own.decode.context == 1010
    assert found.prefill_rounds < own.prefill_rounds / 5


def test_fills_of_a_decode_round_lie_between_a_prompt_and_all_of_a_row():
    found = rounds_of(Workload(8, 100, 60), 8, 4096, 4096)
    assert [turn.context for turn in found.fills()] == [110, 130, 150]
    assert {turn.rows for turn in found.fills()} == {8}
