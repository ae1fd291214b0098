"""How a layer attends: what it writes, what are its keys and values. Against dense softmax."""

import numpy as np
import pytest
import torch

import dense
from noria import attention, kinds
from noria.arrays import Array, encoded, keys_and_values
from noria.attention import items, sdpa
from noria.engine import states
from noria.engine.batch import Microbatch, cache_rows
from noria.engine.layer_cache import LayerCache
from noria.kernels.scoring import HeadShape, ScoringKind
from noria.model import ModelShape
from noria.models import _rotary
from noria.step import Step

CPU = torch.device("cpu")
SPANS = dense.CASES["prompts beside decoding rows"]
TOKENS = sum(span.count for span in SPANS)


def opened(tied=False, states=(), **arrays):
    rows = torch.from_numpy(cache_rows(SPANS))
    microbatch = Microbatch(0, TOKENS, torch.arange(TOKENS), rows, None, sdpa.prepare(SPANS, CPU), None)
    entry = [
        Array(name, tuple(array.shape[1:]), "sequence" if name in states else "token") for name, array in arrays.items()
    ]
    return LayerCache(sdpa, microbatch, arrays, entry, tied), rows


def with_states(reads, writes, **arrays):
    """A cache for rows that read and write these states."""
    counts = np.array([span.count for span in SPANS])
    ids = {"reads": np.array(reads), "writes": np.array(writes), "kept": counts}
    step = Step(0, 0, counts=counts, **ids)
    tensors = list(map(torch.from_numpy, states.arrays_of(step, 0, len(counts), None)))
    microbatch = Microbatch(0, TOKENS, torch.arange(TOKENS), None, None, None, None, states.on_device(tensors))
    entry = [Array(name, tuple(array.shape[1:]), "sequence") for name, array in arrays.items()]
    return LayerCache(sdpa, microbatch, arrays, entry)


def random(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


def test_an_array_of_one_vector_a_token_is_keys_and_its_first_numbers_are_values():
    latent, queries, new = random(22 * 16, 40), random(TOKENS, 4, 40), random(TOKENS, 40)
    cache, rows = opened(latent=latent[:, None].clone())
    found = cache.attend(queries, scale=0.3, window=9, values=24, latent=new)
    latent[rows] = new
    values = latent[:, None].clone()
    values[..., 24:] = 0
    expected = dense.attention(SPANS, queries, latent[:, None], values, 0.3, 9)
    assert found.shape == (TOKENS, 4, 24)
    torch.testing.assert_close(found, expected[..., :24], rtol=0, atol=1e-12)


def test_a_layer_that_gives_no_rows_reads_what_is_there():
    key, value, queries = random(22 * 16, 2, 8), random(22 * 16, 2, 8) + 1, random(TOKENS, 4, 8)
    cache, _ = opened(key=key, value=value)
    expected = dense.attention(SPANS, queries, key, value, 8**-0.5, None)
    torch.testing.assert_close(cache.attend(queries), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        cache.attend(queries, values="key"),
        dense.attention(SPANS, queries, key, key, 8**-0.5, None),
        rtol=0,
        atol=1e-12,
    )


def test_keys_that_a_tied_layer_finds_are_those_of_tokens_also_where_states_come_first():
    key, value, queries = random(22 * 16, 2, 8), random(22 * 16, 2, 8) + 1, random(TOKENS, 4, 8)
    cache, _ = opened(tied=True, states=["state"], state=random(3, 5), key=key, value=value)
    expected = dense.attention(SPANS, queries, key, value, 8**-0.5, None)
    torch.testing.assert_close(cache.attend(queries), expected, rtol=0, atol=1e-12)


NEW, STATES = random(TOKENS, 2, 8), random(len(SPANS), 5)
WRONG = {
    "rows of an array that is not there": (
        False,
        lambda cache: cache.attend(NEW, keys=NEW),
        "no such array 'keys'; it has key, value",
    ),
    "rows of a state": (False, lambda cache: cache.attend(NEW, state=NEW), "no such array 'state'; it has key, value"),
    "values that are not there": (
        False,
        lambda cache: cache.attend(NEW, values="v"),
        "no such array 'v'; it has key, value",
    ),
    "rows of another layer": (
        True,
        lambda cache: cache.attend(NEW, key=NEW, value=NEW),
        "another's cache gives rows of key, value",
    ),
    "a state that is not there": (False, lambda cache: cache.before("sum"), "no such array 'sum'; it has state"),
    "a state of tokens": (False, lambda cache: cache.after("key", STATES), "no such array 'key'; it has state"),
    "a state of another layer": (True, lambda cache: cache.before("state"), "no such array 'state'; it has none"),
}


@pytest.mark.parametrize("harm", WRONG)
def test_a_layer_that_errs_about_its_arrays_is_told_which_it_has(harm):
    tied, act, words = WRONG[harm]
    arrays = {"key": random(22 * 16, 2, 8), "value": random(22 * 16, 2, 8), "state": random(3, 5)}
    cache, _ = opened(tied=tied, states=["state"], **arrays)
    with pytest.raises(AssertionError, match=words):
        act(cache)


def test_a_layer_that_gives_states_of_another_shape_or_none_is_told_so():
    cache = with_states([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], state=torch.zeros(6, 2), tail=torch.zeros(6, 3))
    with pytest.raises(AssertionError, match=r"states of 'state' are given as \[5, 3\], they are \[5, 2\]"):
        cache.after("state", torch.ones(5, 3))
    with pytest.raises(AssertionError, match=r"states of 'state' are given as \[1, 2\], they are \[5, 2\]"):
        cache.after("state", torch.ones(1, 2))
    cache.after("state", torch.ones(5, 2))
    with pytest.raises(AssertionError, match=r"has not called after\(\) for tail"):
        cache.commit()


def test_rotary_turns_queries_and_new_keys_on_the_way_into_the_cache():
    queries, new = random(TOKENS, 4, 8), {"key": random(TOKENS, 2, 8), "value": random(TOKENS, 2, 8) + 1}
    turn = _rotary.tables(1e4, None, 8, torch.arange(TOKENS), torch.float64)
    arrays = {name: random(22 * 16, 2, 8) for name in new}
    one, rows = opened(**{name: array.clone() for name, array in arrays.items()})
    other, _ = opened(**arrays)
    turned = new | {"key": _rotary.rotate(new["key"], *turn)}
    assert torch.equal(one.attend(queries, rotary=turn, **new), other.attend(_rotary.rotate(queries, *turn), **turned))
    assert torch.equal(arrays["key"][rows], turned["key"])


@pytest.mark.parametrize("asked", [{"sinks": random(4)}, {"soft_cap": 1.5}, {"sinks": random(4), "soft_cap": 0.5}])
def test_sinks_and_a_soft_cap_of_a_layer_reach_its_scores(asked):
    key, value, queries = random(22 * 16, 2, 8), random(22 * 16, 2, 8) + 1, random(TOKENS, 4, 8)
    cache, _ = opened(key=key, value=value)
    expected = dense.attention(SPANS, queries, key, value, 8**-0.5, 9, asked.get("soft_cap"), asked.get("sinks"))
    torch.testing.assert_close(cache.attend(queries, window=9, **asked), expected, rtol=0, atol=1e-12)


def test_layers_that_a_fast_kind_cannot_compute_attend_by_the_kind_that_does_everything(monkeypatch):
    refusal, asked = "it computes 256", []

    def refuses(device, dtype, heads, scored):
        asked.append((heads, scored))
        return refusal if heads.dim > 256 else ""

    monkeypatch.setattr(items, "refuses", refuses)
    plain, wide, unsaid = keys_and_values(2, 64), keys_and_values(1, 512), (Array("latent", (64,)),)
    latents = [(Array("latent", (size + 64,), value=size),) for size in (128, 512)]
    state, windowed = (Array("state", (3, 3), "sequence"),), keys_and_values(2, 64, 7)
    for cache, kind, why in (
        ((plain, plain, 0), "items", ""),
        ((plain, state), "items", ""),
        (((Array("key", (2, 64)), Array("value", (2, 32))), plain), "items", ""),
        ((plain, wide), "sdpa", f"not items: {refusal}"),
        ((plain, unsaid), "sdpa", "a layer's arrays do not say what its keys and values are"),
        ((latents[0],), "items", ""),
        ((plain, latents[1]), "sdpa", f"not items: {refusal}"),
        ((state,), "sdpa", "no layer attends"),
        ((plain, windowed), "items", ""),
    ):
        shape = ModelShape("llama", len(cache), 64, 4, 2, 64, 100, 100, False, cache=cache)
        found, said = attention.fitting(CPU, torch.bfloat16, shape)
        assert (kinds.name_of(found), said) == (kind, why), cache
    assert asked[-1] == (HeadShape(4, 2, 64, 64), {ScoringKind(), ScoringKind(7)})


def test_latents_in_fewer_bits_are_decoded_before_they_are_attended_to():
    cache = (encoded((Array("latent", (96,), value=64),), "int8"),)
    shape = ModelShape("llama", 1, 64, 4, 2, 64, 100, 100, False, cache=cache)
    assert attention.decodes_ahead(items, CPU, torch.bfloat16, shape) == "values lie within keys"


def test_a_layer_finds_its_sequences_states_and_leaves_new_ones_only_when_it_has_returned():
    before = random(6, 2, 3)
    before[4] = torch.nan  # of a row that begins here: never read
    state = before.clone()
    cache = with_states([2, -1, 2, 0, 5], [2, 4, 1, 0, 3], state=state)
    assert cache.starts.tolist() == [0, 17, 18, 23, 24, 26] and cache.kept.tolist() == [17, 1, 5, 1, 2]
    found = cache.before("state")
    assert torch.equal(found[[0, 2, 3, 4]], before[[2, 2, 0, 5]]) and not found[1].any()
    found += 1  # a copy: the cache stays as it is
    cache.after("state", found)
    assert torch.equal(state.nan_to_num(), before.nan_to_num())
    cache.commit()
    assert torch.equal(state[[2, 4, 1, 0, 3]], found) and torch.equal(state[5], before[5])


def test_a_layer_that_does_not_return_leaves_no_state_and_half_precisions_are_widened():
    state = torch.zeros(6, 2)
    cache = with_states([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], state=state)
    cache.after("state", torch.ones(5, 2, dtype=torch.bfloat16))
    again = with_states([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], state=state)
    assert not again.before("state").any()
    again.after("state", torch.ones(5, 2, dtype=torch.bfloat16))
    again.commit()
    assert state.dtype == torch.float32 and state.sum() == 10
