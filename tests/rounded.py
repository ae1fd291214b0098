"""How a cache in fewer bits rounds a key or a value, in numpy, from the formats' definitions. Knows nothing of Noria."""

import numpy as np

GROUPS = {"key": 64, "value": None}  # numbers of a head that share a scale; None: all
_BYTES = np.arange(256)
# e4m3 of the OCP's FP8: a sign, 4 bits of exponent with a bias of 7, 3 of mantissa; 127 is no number.
_FRACTION, _EXPONENT = _BYTES % 8, _BYTES // 8 % 16
E4M3 = np.where(_EXPONENT > 0, (1 + _FRACTION / 8) * 2.0 ** (_EXPONENT - 7), _FRACTION / 8 * 2.0**-6)[:127]


def rounded(numbers, kind, of):
    """Keys or values (`of`) [..., D] as a cache of this kind gives them back."""
    size = GROUPS[of] or numbers.shape[-1]
    groups = [numbers[..., first : first + size] for first in range(0, numbers.shape[-1], size)]
    return np.concatenate([{"int8": _int8, "int4": _int4, "fp8": _fp8}[kind](group) for group in groups], axis=-1)


def attention(kind, dense):
    """`dense(q, k, v, window)` over what a cache of this kind gives back of [T, H, D]."""
    return lambda q, k, v, window=None: dense(q, rounded(k, kind, "key"), rounded(v, kind, "value"), window)


def bfloat16(numbers):
    """The nearest ones, of two as near the one whose last bit is 0."""
    bits = np.asarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(float)


def _int8(group):
    """From -128, which the number farthest from zero gets, to 127 steps."""
    places = np.abs(group).argmax(-1, keepdims=True)
    steps = bfloat16(np.take_along_axis(group, places, -1) / -128)
    steps = np.where(steps == 0, 2.0**-120, steps)
    return np.clip(np.rint(group / steps), -128, 127) * steps


def _int4(group):
    """16 numbers from the least to the largest, of which one is zero."""
    least = np.minimum(group.min(-1, keepdims=True), 0)
    most = np.maximum(group.max(-1, keepdims=True), 0)
    steps = bfloat16((most - least) / 15)
    steps = np.where(steps == 0, 2.0**-120, steps)
    zeros = np.clip(np.rint(-least / steps), 0, 15)
    return (np.clip(np.rint(group / steps) + zeros, 0, 15) - zeros) * steps


def _fp8(group):
    """e4m3 under the least power of two that leaves no number above 448."""
    most = np.abs(group.astype(np.float32)).max(-1, keepdims=True).astype(float)
    scales = 2.0 ** np.ceil(np.log2(np.maximum(most, 2.0**-126 * 448) / 448))
    wanted = np.abs(group.astype(np.float32).astype(float) / scales)
    above = np.clip(np.searchsorted(E4M3, wanted), 1, 126)
    low, high = E4M3[above - 1], E4M3[above]
    codes = np.where(
        (wanted - low < high - wanted) | ((wanted - low == high - wanted) & (above % 2 == 1)), above - 1, above
    )
    return np.sign(group) * E4M3[codes] * scales
