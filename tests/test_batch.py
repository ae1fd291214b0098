import numpy as np

from noria.engine.batch import PageTable, cache_rows, to_staging
from noria.engine.kv_cache import TierPages
from noria.step import Admitted, Run, Span, Step


def admit(pages, **slots):
    admitted = tuple(Admitted(int(slot[1:]), runs, {}) for slot, runs in slots.items())
    pages.apply(Step(0, 0, admitted=admitted))


def test_a_steps_rows_become_spans_counted_from_their_microbatch():
    pages = PageTable()
    admit(pages, s5=(Run(0, 2),), s2=(Run(4, 1), Run(2, 1)))
    step = Step(0, 0, slots=np.array([5, 2, 5]), counts=np.array([1, 3, 2]), positions=np.array([20, 0, 7]))
    assert pages.spans(step, 0, 1) == [Span(0, 1, 21, (Run(0, 2),))]
    assert pages.spans(step, 1, 3) == [Span(0, 3, 3, (Run(4, 1), Run(2, 1))), Span(3, 2, 9, (Run(0, 2),))]


def test_a_slot_that_is_released_can_be_admitted_again_in_the_same_step():
    pages = PageTable()
    admit(pages, s1=(Run(0, 1),))
    pages.apply(Step(1, 0, released=(1,), admitted=(Admitted(1, (Run(3, 1),), {}),)))
    step = Step(1, 0, slots=np.array([1]), counts=np.array([1]), positions=np.array([0]))
    assert pages.spans(step, 0, 1)[0].runs == (Run(3, 1),)


def test_new_tokens_go_to_the_rows_of_their_positions_across_runs():
    one = Span(0, 3, 18, (Run(2, 2),))
    many = Span(3, 4, 18, (Run(5, 1), Run(0, 1)))
    assert cache_rows([one, many]).tolist() == [47, 48, 49, 94, 95, 0, 1]


def test_a_sequence_on_the_device_is_not_staged():
    pages, cpu = PageTable(), TierPages(2, 4, None, (), ())
    admit(pages, s0=(Run(1, 1),))
    step = Step(0, 0, slots=np.array([0]), counts=np.array([3]), positions=np.array([0]))
    spans = pages.spans(step, 0, 1)
    assert to_staging(spans, [cpu]) == (spans, None)
