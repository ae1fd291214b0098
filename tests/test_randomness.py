"""The random numbers of a run against XXH3 as its specification says, and against what random means."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from noria.rows.randomness import begun, uniform, uniforms

MASK = 2**64 - 1
SECRET = bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f")


def xxh3_of_32_bytes(data: bytes) -> int:
    """XXH3 (64 bits, seed 0) of 17 to 32 bytes, from the specification (XXH3_len_17to128_64b)."""

    def mix(data, secret):
        word = int.from_bytes
        low = word(data[:8], "little") ^ word(secret[:8], "little")
        high = word(data[8:], "little") ^ word(secret[8:], "little")
        product = low * high
        return (product & MASK) ^ (product >> 64)

    total = (len(data) * 0x9E3779B185EBCA87 + mix(data[:16], SECRET[:16]) + mix(data[-16:], SECRET[16:])) & MASK
    total ^= total >> 37
    total = (total * 0x165667919E3779F9) & MASK
    return total ^ (total >> 32)


words = st.integers(-(2**63), 2**63 - 1)
places = st.integers(0, 2**31 - 1)


@given(words, words, words, words)
def test_the_number_is_the_upper_53_bits_of_xxh3_of_the_four(seed, row, sample, position):
    data = b"".join(word.to_bytes(8, "little", signed=True) for word in (seed, row, sample, position))
    number = uniform(seed, row, sample, position)
    assert number == (xxh3_of_32_bytes(data) >> 11) / 2**53
    assert 0 <= number < 1


@given(st.lists(st.tuples(words, words, places, places)))
def test_the_numbers_of_many_rows_at_once_are_those_of_each(rows):
    samples, positions = (np.array([row[place] for row in rows], np.int32) for place in (2, 3))
    found = uniforms(np.array([begun(seed, row) for seed, row, *_ in rows], np.uint64), samples, positions)
    assert found.tolist() == [uniform(*row) for row in rows]


def test_neighbouring_rows_samples_positions_and_seeds_share_no_number():
    numbers = [uniform(*four) for four in itertools.product(range(12), repeat=4)]
    assert len(set(numbers)) == len(numbers)


def test_numbers_are_even_and_do_not_follow_each_other():
    table = np.array([[uniform(7, row, 0, position) for position in range(300)] for row in range(300)])
    counts, _ = np.histogram(table, bins=100, range=(0, 1))
    expected = table.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square, 99 degrees of freedom: p = 1e-4
    centred = table - table.mean()
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(shifted.mean() / centred.var()) < 4 / np.sqrt(shifted.size)
