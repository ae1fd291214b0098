"""The random numbers of a run: one number in [0, 1) for every token sampled, from four integers alone.

So a row samples the same tokens on any device, in any batch, after a resume and in any shard. Knows no generator state.
"""

import struct

import numpy as np
import xxhash

_KEY = struct.Struct("<4q")
_BITS = 53  # of a float64's mantissa: every multiple of 2**-53 in [0, 1) is exact
_WORD = 2**64 - 1
_HALF = np.uint64(32)
_LOW = np.uint64(2**32 - 1)
# Of XXH3's specification (XXH3_len_17to128_64b): the secret's first four words, and its two factors.
_SECRET = (0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072)
_OF_LENGTH = 32 * 0x9E3779B185EBCA87
_AVALANCHE = np.uint64(0x165667919E3779F9)


def uniform(seed: int, row: int, sample: int, position: int) -> float:
    """The number in [0, 1) that decides token `position` (0: the first generated) of a sample of a global row.

    The upper 53 bits of XXH3 (64 bits, seed 0; github.com/Cyan4973/xxHash) of the four as little-endian int64, times
    2**-53. All four lie in -2**63 .. 2**63-1.
    """
    return (xxhash.xxh3_64_intdigest(_KEY.pack(seed, row, sample, position)) >> (64 - _BITS)) * 2.0**-_BITS


def begun(seed: int, row: int) -> int:
    """What the numbers of a row have in common, for `uniforms`: XXH3 adds what it makes of the four's two halves."""
    product = ((seed & _WORD) ^ _SECRET[0]) * ((row & _WORD) ^ _SECRET[1])
    return (_OF_LENGTH + ((product & _WORD) ^ (product >> 64))) & _WORD


def uniforms(begun: np.ndarray, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[R] the numbers of many rows at once, each that of `uniform`. begun: [R] uint64; samples, positions: [R] from 0 on."""
    one = samples.astype(np.uint64) ^ np.uint64(_SECRET[2])
    other = positions.astype(np.uint64) ^ np.uint64(_SECRET[3])
    total = begun + _folded(one, other)
    total ^= total >> np.uint64(37)
    total *= _AVALANCHE
    total ^= total >> _HALF
    return (total >> np.uint64(64 - _BITS)).astype(np.float64) * 2.0**-_BITS


def _folded(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The two halves of the products of 128 bits, by exclusive or; made of products of 32 bits."""
    low, high, its_low, its_high = one & _LOW, one >> _HALF, other & _LOW, other >> _HALF
    first, second = low * its_high, high * its_low
    middle = (low * its_low >> _HALF) + (first & _LOW) + (second & _LOW)
    return (one * other) ^ (high * its_high + (first >> _HALF) + (second >> _HALF) + (middle >> _HALF))
