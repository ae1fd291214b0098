"""Bytes and places of a cache whose layers differ."""

import pytest

from noria.arrays import Array, Layout, attended, keys_and_values
from noria.model import ModelShape

LATENT = (Array("latent", (40,)),)
STATE = (Array("state", (3, 5), "sequence", "float32"), Array("tail", (7,), "sequence"))


def shape(*cache):
    return ModelShape("llama", len(cache), 8, 2, 1, 4, 10, 64, False, cache=cache)


def test_a_family_that_says_nothing_has_keys_and_values_in_every_layer():
    plain = ModelShape("llama", 3, 8, 2, 1, 4, 10, 64, False)
    assert plain.cache == (keys_and_values(1, 4),) * 3
    assert plain.cache_nbytes([range(1), range(2, 3)], "float16") == 2 * 2 * 4 * 2
    assert plain.attended([range(3)]) == 3 * 8


def test_bytes_are_sums_over_layers_that_differ_and_one_that_reads_another_has_none():
    found = shape(LATENT, keys_and_values(2, 4), 1, STATE)
    assert [found.cache_nbytes([range(layer, layer + 1)], "float32") for layer in range(4)] == [160, 64, 0, 0]
    assert found.cache_nbytes([range(4)], "float32", "sequence") == 64 + 32  # 60 and 28 bytes, aligned to 16
    assert found.cache_nbytes([range(1), range(3, 4)], "bfloat16", "sequence") == 64 + 16
    assert [found.attended([range(layer, layer + 1)]) for layer in range(4)] == [80, 8, 8, 0]
    assert [found.reads(layer) for layer in range(4)] == [0, 1, 1, 3]
    assert found.arrays(2) == ()


@pytest.mark.parametrize(
    ("own", "run", "expected"),
    [(None, "bfloat16", "bfloat16"), ("float32", "bfloat16", "float32"), ("float32", "float64", "float64"),
     ("float32", "float32", "float32"), ("bfloat16", "float16", "bfloat16")],
)  # fmt: skip
def test_an_arrays_own_dtype_is_widened_where_the_run_is_wider_and_never_narrowed(own, run, expected):
    assert Array("a", (2,), dtype=own).computed(run) == expected


def test_arrays_lie_one_after_another_and_begin_where_any_dtype_may():
    layout = Layout({0: LATENT, 2: STATE, 5: keys_and_values(1, 3)}, "float16", pages=2, states=3)
    assert layout.offsets == {
        (0, "latent"): 0,
        (2, "state"): 32 * 80,
        (2, "tail"): 32 * 80 + 3 * 64,
        (5, "key"): 32 * 80 + 3 * 64 + 3 * 16,
        (5, "value"): 32 * 80 + 3 * 64 + 3 * 16 + 32 * 6,
    }
    assert layout.nbytes == layout.offsets[5, "value"] + 32 * 6
    assert all(offset % 16 == 0 for offset in layout.offsets.values())


def test_keys_and_values_of_one_array_are_counted_twice():
    assert attended(LATENT) == 80 and attended(keys_and_values(4, 16)) == 32 and attended(STATE) == 0


def test_a_shape_with_another_number_of_caches_than_layers_is_a_defect():
    with pytest.raises(AssertionError, match="1 caches of 2 layers"):
        ModelShape("llama", 2, 8, 2, 1, 4, 10, 64, False, cache=(LATENT,))


@pytest.mark.parametrize(
    ("cache", "words"),
    [((LATENT, 1), "layer 1 reads the cache of layer 1"), ((LATENT, 2, LATENT), "layer 1 reads the cache of layer 2"),
     ((LATENT, 0, 1), "layer 2 reads the cache of layer 1, which is no earlier one with arrays"),
     ((LATENT, -2), "layer 1 reads the cache of layer -2"), ((LATENT + LATENT,), "layer 0 has arrays of one name: latent, latent"),
     (((Array("a", (2,), "tokens"),),), "'a' is per 'tokens': token or sequence"),
     (((Array("a", (2,), dtype="int32"),),), "'a' has dtype 'int32': a cache has float64, float32, bfloat16, float16")],
)  # fmt: skip
def test_entries_that_no_cache_can_be_made_of_are_defects(cache, words):
    with pytest.raises(AssertionError, match=words):
        shape(*cache)
