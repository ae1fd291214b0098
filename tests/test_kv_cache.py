import numpy as np
import pytest
import torch

from noria.blocks import ModelShape
from noria.engine.kv_cache import KvCache, cache_rows
from noria.step import Admitted, Run, Span, Step

SHAPE = ModelShape("llama", 4, 8, 2, 1, 4, 10, 64, False)


def cache():
    return KvCache(SHAPE, [1, 3], 6, torch.float32, torch.device("cpu"))


def admit(kv_cache, **slots):
    admitted = tuple(Admitted(int(slot[1:]), runs, {}) for slot, runs in slots.items())
    kv_cache.apply(Step(0, 0, admitted=admitted))


def test_each_layer_has_its_own_pages():
    kv_cache = cache()
    keys, values = kv_cache.layer(1)
    assert keys.shape == values.shape == (6 * 16, 1, 4)
    assert kv_cache.nbytes == 2 * 2 * keys.nbytes
    keys.fill_(1)
    kv_cache.layer(3)[0].fill_(2)
    assert (kv_cache.layer(1)[0] == 1).all()
    with pytest.raises(KeyError):
        kv_cache.layer(2)


def test_a_steps_rows_become_spans_counted_from_their_microbatch():
    kv_cache = cache()
    admit(kv_cache, s5=(Run(0, 2),), s2=(Run(4, 1), Run(2, 1)))
    step = Step(0, 0, slots=np.array([5, 2, 5]), counts=np.array([1, 3, 2]), positions=np.array([20, 0, 7]))
    assert kv_cache.spans(step, 0, 1) == [Span(0, 1, 21, (Run(0, 2),))]
    assert kv_cache.spans(step, 1, 3) == [Span(0, 3, 3, (Run(4, 1), Run(2, 1))), Span(3, 2, 9, (Run(0, 2),))]


def test_a_slot_that_is_released_can_be_admitted_again_in_the_same_step():
    kv_cache = cache()
    admit(kv_cache, s1=(Run(0, 1),))
    kv_cache.apply(Step(1, 0, released=(1,), admitted=(Admitted(1, (Run(3, 1),), {}),)))
    step = Step(1, 0, slots=np.array([1]), counts=np.array([1]), positions=np.array([0]))
    assert kv_cache.spans(step, 0, 1)[0].runs == (Run(3, 1),)


def test_new_tokens_go_to_the_rows_of_their_positions_across_runs():
    one = Span(0, 3, 18, (Run(2, 2),))
    many = Span(3, 4, 18, (Run(5, 1), Run(0, 1)))
    assert cache_rows([one, many]).tolist() == [47, 48, 49, 94, 95, 0, 1]
