"""The random numbers of a run: one number in [0, 1) for every token sampled, from four integers alone.

So a row samples the same tokens on any device, in any batch, after a resume and in any shard. Knows no generator state.
"""

import struct

import xxhash

_KEY = struct.Struct("<4q")
_BITS = 53  # of a float64's mantissa: every multiple of 2**-53 in [0, 1) is exact


def uniform(seed: int, row: int, sample: int, position: int) -> float:
    """The number in [0, 1) that decides token `position` (0: the first generated) of a sample of a global row.

    The upper 53 bits of XXH3 (64 bits, seed 0; github.com/Cyan4973/xxHash) of the four as little-endian int64, times
    2**-53. All four lie in -2**63 .. 2**63-1.
    """
    return (xxhash.xxh3_64_intdigest(_KEY.pack(seed, row, sample, position)) >> (64 - _BITS)) * 2.0**-_BITS
