"""Steps made by index expressions against the same steps made row by row, one token after another, in plain lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counts import count
from noria.borders import cut
from noria.limits import RUN_PAGES
from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.randomness import uniform
from noria.rows.slots import Capacity
from noria.sampling import Sampling
from noria.step import NO_TOKEN, Result, Word

ENDS, CONTEXT = frozenset({7, 3}), 300


def next_token(tokens):
    """A model of one line: the next token is a function of all tokens before it; a few of them are not finite."""
    found = (sum(tokens) * 31 + len(tokens)) % 97
    return NO_TOKEN if found == 96 and len(tokens) % 3 == 0 else found


class Row:
    """A row that is told each of its tokens and looks at all of them: what should be generated."""

    def __init__(self, prompt, sample):
        self.prompt, self.sample, self.new, self.error = prompt, sample, [], ""
        self.sampling = Sampling().override(prompt.sampling)
        self.cached, self.slot = 0, None

    @property
    def tokens(self):
        return [*self.prompt.token_ids, *self.new]

    @property
    def reason(self):
        """Why it has ended, if it has."""
        ends = [*([] if self.sampling.ignore_eos else ENDS), *(self.sampling.stop_token_ids or [])]
        if self.new and self.new[-1] in ends:
            return "stop"
        full = len(self.new) >= self.sampling.max_new_tokens or len(self.tokens) >= CONTEXT
        return "length" if full else "none"

    def generate(self):
        while self.reason == "none" and not self.error:
            token = next_token(self.tokens)
            self.error = "not finite" if token == NO_TOKEN else ""
            self.new += [] if self.error else [token]
        return self

    def uniform(self):
        own = 0 if "seed" in self.prompt.sampling else self.prompt.row
        return uniform(self.sampling.seed or 0, own, self.sample, len(self.new)) if self.sampling.temperature else 0.0


class Rank:
    """Answers steps and checks each of them against rows that it keeps in lists; `rows`: of the run, by (row, sample)."""

    def __init__(self, limits, rows, admission):
        self.limits, self.rows, self.admission = limits, rows, admission
        self.by_slot, self.answered = {}, {}

    def look(self, step):
        """The step's rows against lists; what it takes from the step before is known here."""
        for slot in step.released:
            self.by_slot.pop(slot)
        for admitted in step.admitted:
            sequence = self.admission._slots.active[step.group][admitted.slot]
            row = self.by_slot[admitted.slot] = self.rows[sequence.prompt.row, sequence.sample]
            row.cached = None  # as many as it shares
            del row.new[len(sequence.token_ids) :]  # what was on its way when it returned to the line
        before = self.answered.get(step.group, np.empty(0, np.int64))
        self.ids = np.where(
            step.token_ids < 0, before[np.maximum(-1 - step.token_ids, 0)] if len(before) else 0, step.token_ids
        )
        ends, samples, scores = np.cumsum(step.counts).tolist(), [], []
        for slot, number, position, end in zip(
            step.slots.tolist(), step.counts.tolist(), step.positions, ends, strict=True
        ):
            row = self.by_slot[slot]
            row.cached = int(position) if row.cached is None and position % 64 == 0 else row.cached
            assert position == row.cached
            computed = row.tokens[row.cached : row.cached + number]
            assert len(computed) in (number, number - 1), "tokens that nobody knows"
            assert self.ids[end - number : end].tolist()[: len(computed)] == computed
            if row.sampling.prompt_logprobs and row.cached < len(row.prompt.token_ids):
                following = row.prompt.token_ids[row.cached + 1 : row.cached + number + 1]
                scores += zip(range(end - number, end), following, strict=False)
            row.cached += number
            if row.cached >= len(row.tokens) and row.sampling.max_new_tokens:
                samples.append((end - 1, slot, row.uniform() + bool(row.error)))
        failed = [bool(self.by_slot[slot].error) for slot in step.sample_slots.tolist()]
        uniforms = np.where(failed, [number for *_, number in samples], step.uniforms)
        assert [*zip(step.sample_rows, step.sample_slots, uniforms, strict=True)] == samples
        assert [*zip(step.score_rows, step.score_ids, strict=True)] == scores
        assert step.borders.tolist() == cut(
            step.counts.tolist(), self.limits.microbatch_tokens, self.limits.microbatches
        )
        assert set(step.slots.tolist()) >= {
            slot
            for slot, row in self.by_slot.items()
            if row.cached == len(row.tokens) - 1 and row.new and row.reason == "none" and not row.error
        } & set(self.admission._slots.active[step.group]), "a row that decodes waits"

    def answer(self, step):
        """Samples, with tokens of steps before told to the rows as they come."""
        found = []
        for slot in step.sample_slots.tolist():
            row = self.by_slot[slot]
            found.append(next_token(row.tokens))
            row.error = row.error or ("not finite" if found[-1] == NO_TOKEN else "")
            row.new += [found[-1]] * (not row.error and row.reason == "none")
        ids = np.array(found, np.int64)
        self.answered[step.group] = ids
        scores = step.score_ids / -8.0
        return Result(ids, ids / -4.0, ids[:, None] + np.arange(2), np.zeros((len(ids), 2)), scores)


def in_turn(admission, rank, groups):
    """Each group's step is composed when the result of its last one is there."""
    under_way = [None] * groups
    for round in range(10_000):
        words = set()
        for group in range(groups):
            if under_way[group] is not None:
                admission.apply(*under_way[group])
            step = admission.compose(round, group)
            words.add(step.word)
            if step.word is Word.RUN:
                rank.look(step)
            under_way[group] = (step, rank.answer(step)) if step.num_tokens else None
        if words == {Word.STOP}:
            return
    raise AssertionError("the run does not end")


def ahead(admission, rank, groups):
    """A step is composed while the one before is under way, and its result is taken in after that."""
    before = None
    for round in range(10_000):
        step = admission.compose(round, 0)
        if step.word is Word.STOP:
            admission.apply(*before) if before is not None else None  # what rows that have ended still got
            return
        rank.look(step)
        result = rank.answer(step)
        if before is not None:
            admission.apply(*before)
        before = (step, result) if step.num_tokens else None
    raise AssertionError("the run does not end")


def run(prompts, limits, order=in_turn):
    finished, sampling = [], Sampling()
    rows = {(prompt.row, sample): Row(prompt, sample) for prompt in prompts for sample in range(prompt.sampling["n"])}
    source = Source(prompts, len(prompts), lambda p: p.token_ids, finished.append)
    admission = Admission(source, sampling, ENDS, limits)
    order(admission, Rank(limits, rows, admission), limits.groups)
    return finished


keys = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 300),
        "n": st.integers(1, 2),
        "temperature": st.sampled_from([0.0, 0.7]),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, None, 0, 2]),
    },
    optional={
        "seed": st.integers(0, 2**62),
        "stop_token_ids": st.sampled_from([[5], [40, 50], [*range(20, 60)]]),
        "prompt_logprobs": st.just(True),
    },
)
alike = st.sampled_from([[1] * 130, [2] * 70, [3]])  # beginnings that rows share
prompts = st.lists(st.tuples(alike, st.lists(st.integers(10, 90), min_size=1, max_size=60), keys), max_size=16)


def prompts_of(of_rows):
    return [
        Prompt(
            row,
            str(row),
            "",
            [*begin, *rest],
            {key: value for key, value in own.items() if value is not None},
            "",
            None,
        )
        for row, (begin, rest, own) in enumerate(of_rows)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("order", [in_turn, ahead])
@settings(max_examples=count(500), deadline=None)
@given(
    of_rows=prompts, groups=st.integers(1, 3), step_tokens=st.integers(3, 150), runs=st.integers(8, 60), data=st.data()
)
def test_steps_of_arrays_are_those_of_lists(order, of_rows, groups, step_tokens, runs, data):
    groups, microbatches = 1 if order is ahead else groups, data.draw(st.integers(1, 3))
    microbatch_tokens = data.draw(st.integers(2, step_tokens))
    limits = Capacity(groups, runs * RUN_PAGES, step_tokens, microbatch_tokens, microbatches, CONTEXT, 1000)
    its = prompts_of(of_rows)
    finished = {(one.prompt.row, one.sample): one for one in run(its, limits, order)}
    assert len(finished) == sum(prompt.sampling["n"] for prompt in its)
    for (row, sample), one in finished.items():
        whole = Row(its[row], sample).generate()
        assert (one.token_ids, "not finite" in one.error) == (whole.new, bool(whole.error)), (one.error, whole.error)
        if not whole.error:
            assert one.finish_reason == whole.reason
            asked = whole.sampling.logprobs
            assert one.logprobs == ([token / -4 for token in whole.new] if asked is not None else [])
            assert [ids.tolist() for ids, _ in one.top] == [
                [token + i for i in range(asked)] for token in whole.new if asked
            ]
        if one.prompt_logprobs is not None and not whole.error:
            assert one.prompt_logprobs[1:].tolist() == [token / -8 for token in its[row].token_ids[1:]]


def test_a_row_ends_with_any_of_more_token_ids_than_are_compared_at_once():
    keys = {"n": 1, "max_new_tokens": 60, "ignore_eos": True, "stop_token_ids": [*range(20, 60)]}
    its = [Prompt(row, str(row), "", [10 + row, 11], keys, "", None) for row in range(12)]
    for one in run(its, Capacity(1, 100, 64, 64, 1, CONTEXT, 1000)):
        assert one.token_ids == Row(one.prompt, 0).generate().new and one.token_ids[-1] in keys["stop_token_ids"]


@settings(max_examples=count(500), deadline=None)
@given(of_rows=prompts, order=st.sampled_from([in_turn, ahead]), rounds=st.integers(1, 60), runs=st.integers(8, 60))
def test_rows_that_are_stopped_have_the_first_of_their_tokens(of_rows, order, rounds, runs):
    its = prompts_of(of_rows)
    compose, stopped = Admission.compose, []

    def stopping(admission, round, group):
        stopped.extend(admission.stop() if round == rounds else ())
        return compose(admission, round, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "compose", stopping)
        finished = run(its, Capacity(1, runs * RUN_PAGES, 100, 100, 1, CONTEXT, 1000), order)
    for one in (*finished, *stopped):
        whole = Row(one.prompt, one.sample).generate()
        assert one.token_ids == whole.new[: len(one.token_ids)]
        assert len(one.logprobs) == (len(one.token_ids) if one.sampling.logprobs is not None else 0)
    assert len({(one.prompt.row, one.sample) for one in (*finished, *stopped)}) == len(finished) + len(stopped)
