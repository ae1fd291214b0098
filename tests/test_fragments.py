"""A cache that is full of rows of many lengths keeps nearly every row in one run of pages, as attention wants it."""

import numpy as np
import pytest

import noria.rows.slots as slots_module
from counts import count
from noria.attention import pieces
from noria.rows.admission import Admission
from noria.rows.prompts import Prompt
from noria.rows.sequence import Sequence
from noria.rows.slots import Capacity
from noria.rows.waiting import Source, num_pages, num_pages_soon
from noria.sampling import Sampling
from noria.step import Result, Span

END, OTHER = 2, 9
ENDS = 0.01  # of the tokens sampled
NUM_PAGES, GROUPS, ROUNDS, SETTLED = 12_000, 2, 400, 100


def full_cache(seed):
    """(rows in flight, share of their tokens in several pieces) over the rounds after SETTLED, prompts of 50 to 1,000 tokens,
    at most 256 new ones, ends at random."""
    draw = np.random.default_rng(seed)
    lengths = iter(lambda: int(draw.integers(50, 1000)), None)
    prompts = (Prompt(row, str(row), "", [5] * length, {}, "", None) for row, length in enumerate(lengths))
    limits = Capacity(GROUPS, NUM_PAGES, 16384, 16384, 1, 4096, 128_000)
    sampling = Sampling(max_new_tokens=256)
    source = Source(prompts, 1 << 20, lambda p: p.token_ids, lambda row: None)
    admission = Admission(source, sampling, frozenset({END}), limits)
    steps, runs, counted = [None] * GROUPS, {}, []
    for round in range(ROUNDS):
        for group in range(GROUPS):
            if steps[group] is not None:
                ends = draw.random(len(steps[group].sample_slots)) < ENDS
                admission.apply(steps[group], Result(np.where(ends, END, OTHER)))
            steps[group] = step = admission.compose(round, group)
            for slot in step.released:
                del runs[slot]
            runs |= {admitted.slot: admitted.runs for admitted in step.admitted}
            if round >= SETTLED:
                lengths_now = (step.positions + step.counts).tolist()
                rows = zip(step.slots.tolist(), step.counts.tolist(), lengths_now, strict=True)
                tokens = [(length, len(pieces(Span(0, new, length, runs[slot]))) > 1) for slot, new, length in rows]
                counted.append((len(tokens), sum(n for n, _ in tokens), sum(n for n, cut in tokens if cut)))
    rows, tokens, in_pieces = np.sum(counted, axis=0)
    return rows / (ROUNDS - SETTLED), in_pieces / tokens


@pytest.mark.slow
def test_nearly_no_token_of_a_full_cache_lies_in_pieces_and_few_rows_wait_for_that(monkeypatch):
    seeds = range(count(5))
    rows, in_pieces = np.mean([full_cache(seed) for seed in seeds], axis=0)
    monkeypatch.setattr(slots_module, "WHOLE_RUNS_BELOW", 0.0)
    rows_at_most, in_pieces_before = np.mean([full_cache(seed) for seed in seeds], axis=0)
    print(
        f"{in_pieces:.1%} of tokens in pieces instead of {in_pieces_before:.1%}, {rows / rows_at_most:.3f} of the rows in flight"
    )
    assert in_pieces <= 0.03 < 0.3 < in_pieces_before
    assert rows / rows_at_most >= 0.92 + 0.02 * (len(seeds) == 5), "one draw of lengths differs by 0.02 from the next"


@pytest.mark.parametrize(
    ("prompt", "new", "most", "pages"), [(40, 64, 4096, 5), (40, 2**31, 100, 5), (100, 9, 100, 7), (16, 0, 99, 1)]
)
def test_the_pages_that_a_row_fills_soon_are_those_of_its_prompt_and_half_of_what_may_follow(prompt, new, most, pages):
    """16 tokens a page; a context cuts what may follow."""
    one = Sequence(Prompt(0, "", "", [5] * prompt, {}, "", None), Sampling(max_new_tokens=new), [5] * prompt)
    assert num_pages_soon(one, most) == pages <= num_pages(one, most)


@pytest.mark.parametrize(("hole", "runs"), [(3, None), (4, [4, 2])])
def test_where_pages_are_short_a_row_waits_for_a_run_of_those_that_it_fills_soon(hole, runs):
    """Of 100 pages 6 are free, in two runs; the row has 32 tokens and may have 64 more: 6 pages, of which it fills 4 soon."""
    keys = [(16 * hole - 1, 1), (16 * 94 - 50, 50), (32, 64)]
    prompts = [
        Prompt(row, str(row), "", [5] * length, {"max_new_tokens": new}, "", None)
        for row, (length, new) in enumerate(keys)
    ]
    limits = Capacity(1, 100, 4096, 4096, 1, 4096, 128_000)
    source = Source(prompts, 3, lambda p: p.token_ids, lambda row: None)
    admission = Admission(source, Sampling(), frozenset({END}), limits)
    step = admission.compose(0, 0)
    assert [len(one.runs) for one in step.admitted] == [1, 1]
    admission.apply(step, Result(np.full(2, OTHER)))  # the first row ends, and leaves its pages
    admitted = admission.compose(1, 0).admitted
    assert [[run.count for run in one.runs] for one in admitted] == ([runs] if runs else [])
