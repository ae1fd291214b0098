"""Heads on their way into the cache, in one launch (Triton): norms and turns of queries and keys, keys and values written.

T tokens, H query heads, Hkv key heads, D head dim, R rotated part of D, Dv numbers of a value.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2048  # numbers of a tile of heads


@triton.jit
def load_parts(at, inside, ROTATED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Of the rotated numbers [N, R] at these places [N, 1] both parts [N, R / 2] in float32: halves, or those of pairs."""
    if PAIRS:
        number = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(at + number, mask=inside & (number < ROTATED), other=0.0).to(tl.float32)
        x, y = tl.split(tl.reshape(both, (at.shape[0], HALF, 2)))
    else:
        number = tl.arange(0, HALF)[None, :]
        x = tl.load(at + number, mask=inside & (number < ROTATED // 2), other=0.0).to(tl.float32)
        y = tl.load(at + number + ROTATED // 2, mask=inside & (number < ROTATED // 2), other=0.0).to(tl.float32)
    return x, y


@triton.jit
def store_parts(at, x, y, inside, ROTATED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Stores what `load_parts` loads."""
    if PAIRS:
        number = tl.arange(0, 2 * HALF)[None, :]
        tl.store(at + number, tl.reshape(tl.join(x, y), (at.shape[0], 2 * HALF)), mask=inside & (number < ROTATED))
    else:
        number = tl.arange(0, HALF)[None, :]
        tl.store(at + number, x, mask=inside & (number < ROTATED // 2))
        tl.store(at + number + ROTATED // 2, y, mask=inside & (number < ROTATED // 2))


@triton.jit
def make_heads(
    source, into, head, there, stride, weight, cosines, sines, eps, DIM: tl.constexpr, ROTATED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, PAIRS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Heads of a token, where they are `there`: normed and turned in float32, the norm rounded as its result is stored.

    ROTATED: 0 for none. PAIRS: each number of even index is turned with the one behind it, else halves with each other.
    HALF, REST: half of what is rotated and what is not, padded.
    """
    kind = into.dtype.element_ty
    inside, first = there[:, None], tl.arange(0, 1)[:, None]
    rest, half = (ROTATED + tl.arange(0, REST))[None, :], tl.arange(0, HALF)[None, :]
    read, write = source + head[:, None] * stride, into + head[:, None] * DIM
    squares = tl.zeros_like(head).to(tl.float32)
    x, y, z = squares, squares, squares
    if ROTATED > 0:
        x, y = load_parts(read, inside, ROTATED, HALF, PAIRS)
        squares += tl.sum(x * x, 1) + tl.sum(y * y, 1)
    if ROTATED < DIM:
        z = tl.load(read + rest, mask=inside & (rest < DIM), other=0.0).to(tl.float32)
        squares += tl.sum(z * z, 1)
    if NORMED:
        factor = (1.0 / tl.sqrt(squares / DIM + eps))[:, None]
        if ROTATED > 0:
            of_x, of_y = load_parts(weight + first, first == 0, ROTATED, HALF, PAIRS)
            x, y = (x * factor * of_x).to(kind).to(tl.float32), (y * factor * of_y).to(kind).to(tl.float32)
        if ROTATED < DIM:
            z = z * factor * tl.load(weight + rest, mask=rest < DIM, other=0.0).to(tl.float32)
    if ROTATED > 0:
        cosine = tl.load(cosines + half, mask=half < ROTATED // 2, other=0.0).to(tl.float32)
        sine = tl.load(sines + half, mask=half < ROTATED // 2, other=0.0).to(tl.float32)
        turned, other = (x * cosine - y * sine).to(kind), (y * cosine + x * sine).to(kind)
        store_parts(write, turned, other, inside, ROTATED, HALF, PAIRS)
    if ROTATED < DIM:
        tl.store(write + rest, z.to(kind), mask=inside & (rest < DIM))


@triton.jit(do_not_specialize_on_alignment=["rows"])
def make_and_write(
    queries, keys, values, made, key_array, value_array, rows, cosines, sines, query_weight, key_weight,
    query_token, query_head, key_token, key_head, value_token, value_head, key_row, value_row, cosine_row, sine_row, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr,
    PAIRS: tl.constexpr, NORMED: tl.constexpr, QUERY_TILES: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of a token's queries, or of its keys and values, which go to its row of the cache. Strides are in elements."""
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cosines, sines = cosines + token * cosine_row, sines + token * sine_row
    if tile < QUERY_TILES:
        head = tile * BLOCK + tl.arange(0, BLOCK)
        make_heads(
            queries + token * query_token, made + token * HEADS * DIM, head, head < HEADS, query_head,
            query_weight, cosines, sines, eps, DIM, ROTATED, HALF, REST, PAIRS, NORMED,
        )  # fmt: skip
    else:
        head = (tile - QUERY_TILES) * BLOCK + tl.arange(0, BLOCK)
        there, row = head < KEY_HEADS, tl.load(rows + token).to(tl.int64)
        make_heads(
            keys + token * key_token, key_array + row * key_row, head, there, key_head,
            key_weight, cosines, sines, eps, DIM, ROTATED, HALF, REST, PAIRS, NORMED,
        )  # fmt: skip
        make_heads(
            values + token * value_token, value_array + row * value_row, head, there, value_head,
            key_weight, cosines, sines, eps, WIDTH, 0, 1, WIDTH_BLOCK, False, False,
        )  # fmt: skip


@lru_cache
def _sizes(heads: int, key_heads: int, dim: int, width: int, rotated: int) -> tuple[int, ...]:
    """Tiles of queries, tiles of keys; heads of a tile; padded half of what is rotated, what is not, and value."""
    block = min(_padded(max(heads, key_heads)), max(1, TILE // _padded(max(dim, width))))
    return -(-heads // block), -(-key_heads // block), block, *map(_padded, (rotated // 2, dim - rotated, width))


def _padded(size: int) -> int:
    """The power of two that holds it: triton's own function takes microseconds."""
    return 1 << (max(size, 1) - 1).bit_length()


def rotate_and_write(
    queries: torch.Tensor,
    rotary: Any,
    new: "tuple[torch.Tensor, torch.Tensor]",
    arrays: "tuple[torch.Tensor, torch.Tensor]",
    rows: torch.Tensor,
) -> torch.Tensor:
    """[T, H, D]: queries [T, H, D] normed and turned; keys [T, Hkv, D] likewise and values [T, Hkv, Dv] go to `rows` of arrays.

    rotary: cosines [T, 1, R] and sines [T, 1, R / 2] or None, whether pairs are turned, weights [D] of the norms or None, and
    their epsilon. Numbers of a head are contiguous; tokens, heads and rows have any stride, heads of a row follow one another.
    Queries that nothing is done to are returned as they are.
    """
    (cosines, sines, pairs, norms, eps), (keys, values), (key_array, value_array) = rotary, new, arrays
    (tokens, heads, dim), (key_heads, width) = queries.shape, values.shape[1:]
    rotated = 0 if cosines is None else cosines.shape[-1]
    makes = cosines is not None or norms is not None
    tiles, others, *sizes = _sizes(heads if makes else 0, key_heads, dim, width, rotated)
    made = queries.new_empty(tokens, heads, dim) if makes else queries
    cosines, sines = (queries, queries) if cosines is None else (cosines, sines)
    weights = (queries, queries) if norms is None else norms
    make_and_write[(tokens, tiles + others)](
        queries, keys, values, made, key_array, value_array, rows, cosines, sines, *weights,
        *queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2], key_array.stride(0), value_array.stride(0),
        cosines.stride(0), sines.stride(0), eps, heads, key_heads, dim, width, rotated, pairs, norms is not None,
        tiles, *sizes, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return made
