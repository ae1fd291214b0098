"""Several samples of a prompt: its prefill is done once, whole pages are shared, everything is given back."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noria.limits import RUN_PAGES
from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.randomness import uniform
from noria.rows.slots import Capacity
from noria.sampling import Sampling
from noria.step import NO_TOKEN, PAGE_TOKENS, Result, Word

END = 7
LIMIT = 300  # tokens of the context
BUDGETS = st.tuples(st.integers(1, 80), st.integers(1, 80))  # of a step and of a microbatch, in tokens


def prompt(row, length, **keys):
    keys = {"temperature": 1.0, "seed": 3} | keys
    return Prompt(row, str(row), "", [100 + (row + place) % 90 for place in range(length)], keys, "", None)


def next_token(tokens, number):
    """A model of two lines: the next token is a function of all tokens before it and of the random number."""
    return (sum(place * token for place, token in enumerate(tokens, 1)) * 31 + int(number * 1e6)) % 50


def expected(one, sample, limit):
    tokens, new = list(one.token_ids), []
    while True:
        new.append(next_token(tokens + new, uniform(3, 0, sample, len(new))))
        if new[-1] == END or len(new) == one.sampling["max_new_tokens"] or len(tokens) + len(new) == limit:
            return new


class Engine:
    """Answers steps from what lies in the pages of a cache, which no row may write where another one reads."""

    def __init__(self, limits):
        self.limits, self.places, self.cache = limits, {}, np.full(limits.num_pages * PAGE_TOKENS, -1)
        self.num_prompt_tokens = 0

    def answer(self, step):
        for slot in step.released:
            del self.places[slot]
        for admitted in (*step.admitted, *step.grown):
            assert all(run.count % RUN_PAGES == 0 for run in admitted.runs)
            pages = [page for run in admitted.runs for page in range(run.start, run.start + run.count)]
            assert len(set(pages)) == len(pages) and max(pages) < self.limits.num_pages
            self.places[admitted.slot] = np.concatenate([np.arange(PAGE_TOKENS) + page * PAGE_TOKENS for page in pages])
        assert step.num_tokens <= self.limits.step_tokens
        ends = np.cumsum(step.counts)
        for slot, count, position, end in zip(step.slots, step.counts, step.positions, ends, strict=True):
            places = self.places[slot][position : position + count]
            tokens = step.token_ids[end - count : end]
            others = np.concatenate([[], *(held for other, held in self.places.items() if other != slot)])
            assert not np.isin(places, others).any(), "written where another row reads"
            self.cache[places] = tokens
            self.num_prompt_tokens += int((tokens >= 100).sum())
        tokens = []
        for row, slot, number in zip(step.sample_rows, step.sample_slots, step.uniforms, strict=True):
            place = int(np.searchsorted(ends, row + 1))
            length = step.positions[place] + step.counts[place]
            assert ends[place] == row + 1 and step.slots[place] == slot
            tokens.append(next_token(self.cache[self.places[slot][:length]].tolist(), number))
        return Result(np.array(tokens, np.int64))


def run(prompts, limits, done=frozenset(), answer=None):
    """(finished sequences, admission, engine) of a whole run, with every step's promises checked."""
    finished = []
    unfinished = [one for one in prompts if (one.row, 0) not in done]
    source = Source(iter(prompts), len(unfinished), lambda p: p.token_ids, finished.append, done=done)
    admission = Admission(source, Sampling(), frozenset({END}), limits)
    engine, under_way = Engine(limits), [None] * limits.groups
    for round in range(20_000):
        words = set()
        for group in range(limits.groups):
            if under_way[group] is not None:
                admission.apply(*under_way[group])
            step = admission.compose(round, group)
            words.add(step.word)
            result = (answer or engine.answer)(step)
            under_way[group] = (step, result) if step.num_tokens else None
        if Word.STOP in words:
            assert words == {Word.STOP}
            slots = admission._slots
            for pages, kept in zip(slots.pages, slots.prefixes.num_pages, strict=True):
                assert pages.num_free + kept == pages.num_pages, "pages that nobody gave back"
                assert all(
                    slots.prefixes.make_room(tier, pages.num_pages, 0, True) for tier, pages in enumerate(slots.pages)
                )
            return finished, admission, engine
    raise AssertionError("the run does not end")


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_sample_of_every_row_ends_once_with_its_own_tokens_whatever_the_groups_and_budgets(data):
    groups, step_tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 160))
    microbatch_tokens, least = data.draw(st.integers(1, step_tokens)), data.draw(st.integers(1, 3))
    limits = Capacity(groups, data.draw(st.integers(20, 100)), step_tokens, microbatch_tokens, least, LIMIT)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60), st.integers(1, 6)), max_size=12))
    prompts = [prompt(row, length, max_new_tokens=new, n=n) for row, (length, new, n) in enumerate(shapes)]
    every = [(one.row, sample) for one in prompts for sample in range(one.sampling["n"])]
    done = data.draw(st.sets(st.sampled_from(every))) if every else set()
    finished, admission, _ = run(prompts, limits, done)
    assert sorted((sequence.prompt.row, sequence.sample) for sequence in finished) == sorted(set(every) - done)
    assert list(admission.samples) == [one.sampling["n"] for one in prompts] and admission.num_rows == len(every)
    for sequence in finished:
        assert sequence.error == "" and sequence.token_ids == expected(sequence.prompt, sequence.sample, LIMIT)


@pytest.mark.parametrize(("length", "again"), [(160, 32), (192, 64), (193, 1), (64, 64), (20, 20), (129, 1)])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_prompt_is_computed_once_but_for_its_last_block(length, again, groups):
    finished, admission, engine = run(
        [prompt(0, length, max_new_tokens=9, n=5)], Capacity(groups, 400, 64, 64, 1, LIMIT)
    )
    assert engine.num_prompt_tokens == length + 4 * again == admission.counted.prompt_tokens
    assert len(finished) == 5 and len({tuple(sequence.token_ids) for sequence in finished}) > 1


def test_samples_share_the_pages_that_would_not_hold_them_all():
    # 5 blocks of prompt and one for new tokens, six times: 36 blocks, and with shared ones 11.
    steps = []
    limits = Capacity(1, 11 * RUN_PAGES, 64, 64, 1, 384)
    engine = Engine(limits)

    def answer(step):
        steps.append(len(step.slots))
        return engine.answer(step)

    finished, _, _ = run([prompt(0, 321, max_new_tokens=60, n=6, ignore_eos=True)], limits, answer=answer)
    assert len(finished) == 6 and max(steps) == 6


@pytest.mark.parametrize("num_blocks", [6, 9, 10, 11, 14])
def test_families_that_hold_nearly_all_pages_never_wait_for_each_other_for_ever(num_blocks):
    limits = Capacity(2, num_blocks * RUN_PAGES, 64, 64, 1, 384)
    prompts = [prompt(row, 257, max_new_tokens=[1, 80, 1, 12][row], n=3, ignore_eos=True) for row in range(4)]
    finished, _, _ = run(prompts, limits)
    assert len(finished) == 12


def test_a_family_is_spread_over_the_groups():
    limits, slots = Capacity(4, 400, 80, 80, 1, LIMIT), {}
    engine = Engine(limits)

    def answer(step):
        slots[step.group] = max(slots.get(step.group, 0), len(step.slots))
        return engine.answer(step)

    run([prompt(0, 80, max_new_tokens=20, n=8, ignore_eos=True)], limits, answer=answer)
    assert sorted(slots.values()) == [2, 2, 2, 2]


def test_a_prompt_that_cannot_run_is_an_error_for_each_of_its_samples():
    bad = Prompt(1, "1", "", None, {}, "", "line 2 is not JSON")
    prompts = [prompt(0, 64, n=3), bad, prompt(2, 3, n=2, max_new_tokens=2)]
    finished, admission, _ = run(prompts, Capacity(1, 100, 64, 64, 1, 64))
    assert [(s.prompt.row, s.sample) for s in finished if s.error] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert len(finished) == 6 and list(admission.samples) == [3, 1, 2]


def test_a_prompt_without_finite_logits_ends_all_its_samples():
    answer = lambda step: Result(np.full(step.num_samples, NO_TOKEN))  # noqa: E731
    finished, _, _ = run([prompt(0, 20, n=3)], Capacity(2, 100, 64, 64, 1, 64), answer=answer)
    assert len(finished) == 3 and all("not finite" in sequence.error for sequence in finished)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"stop": "x"}, "has no tokenizer"),
        ({"stop_token_ids": [50]}, "stop_token_ids has 50: the model's vocabulary has 50"),
        ({"logit_bias": {"77": 1.0}}, "logit_bias has 77"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, more than max_new_tokens (8)"),
        ({"max_new_tokens": 0}, "scores the prompt"),
        ({"max_new_tokens": 0, "logprobs": 0, "n": 2}, "n is 2"),
        ({"n": "two"}, "n is 'two'"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": "a"}, "presence_penalty is 'a'"),
        ({"frequency_penalty": 1000}, "frequency_penalty is 1000"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"stop": [""]}, "stop has ''"),
        ({"logit_bias": {"a": 1}}, "logit_bias has 'a'"),
    ],
)
def test_a_bad_value_is_its_rows_error_and_costs_no_other_row(keys, said):
    limits = Capacity(1, 100, 64, 64, 1, 64, vocab_size=50)
    finished, _, _ = run([prompt(0, 3, **keys), prompt(1, 3, max_new_tokens=2)], limits)
    errors = {sequence.prompt.row: sequence.error for sequence in finished}
    assert said in errors[0] and errors[1] == ""


class Scores(Engine):
    """Also answers the scores that a step asks for: a number that says which token was predicted, after which one."""

    def answer(self, step):
        before = step.token_ids[step.score_rows]
        result = super().answer(step)
        return Result(result.token_ids, prompt_logprobs=-(before * 1000.0 + step.score_ids))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_token_of_a_prompt_is_scored_once_after_the_one_before_it(data):
    limits = Capacity(data.draw(st.integers(1, 3)), 120, *data.draw(BUDGETS), 1, LIMIT)
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["alone", "and more", "no"])), max_size=8)
    )
    kinds = {
        "alone": {"max_new_tokens": 0, "logprobs": 0},
        "and more": {"max_new_tokens": 5, "prompt_logprobs": True, "n": 3},
        "no": {"max_new_tokens": 4},
    }
    prompts = [prompt(row, length, **kinds[kind]) for row, (length, kind) in enumerate(shapes)]
    finished, _, _ = run(prompts, limits, answer=Scores(limits).answer)
    assert len(finished) == sum(kinds[kind].get("n", 1) for _, kind in shapes)
    for sequence in finished:
        ids, kind = sequence.prompt_token_ids, shapes[sequence.prompt.row][1]
        if kind == "no":
            assert sequence.prompt_logprobs is None
            continue
        wanted = [-(before * 1000.0 + after) for before, after in itertools.pairwise(ids)]
        assert np.isnan(sequence.prompt_logprobs[0]) and sequence.prompt_logprobs[1:].tolist() == wanted
        assert sequence.finish_reason == "length" if kind == "alone" else sequence.token_ids


def test_a_prompt_with_scores_that_are_not_finite_is_an_error():
    def answer(step):
        return Result(np.full(step.num_samples, 5), prompt_logprobs=np.full(len(step.score_ids), np.nan))

    finished, _, _ = run([prompt(0, 4, max_new_tokens=0, logprobs=0)], Capacity(1, 9, 64, 64, 1, 64), answer=answer)
    assert "not finite in the prompt" in finished[0].error
