"""Heads on their way into the cache, in one launch (Triton): norms and turns of queries and keys, keys and values written.

T tokens, H query heads, Hkv key heads, D head dim, R rotated part of D, Dv numbers of a value.
"""

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2048  # numbers of a tile of heads


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
    step: tl.constexpr = 2 if PAIRS else 1
    second: tl.constexpr = 1 if PAIRS else ROTATED // 2
    half, rest = tl.arange(0, HALF), ROTATED + tl.arange(0, REST)
    turned, left = there[:, None] & (half < ROTATED // 2)[None, :], there[:, None] & (rest < DIM)[None, :]
    read, write = source + head[:, None] * stride, into + head[:, None] * DIM
    squares = tl.zeros_like(head).to(tl.float32)
    x, y, z = squares, squares, squares
    if ROTATED > 0:
        x = tl.load(read + (step * half)[None, :], mask=turned, other=0.0).to(tl.float32)
        y = tl.load(read + (step * half + second)[None, :], mask=turned, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1) + tl.sum(y * y, 1)
    if ROTATED < DIM:
        z = tl.load(read + rest[None, :], mask=left, other=0.0).to(tl.float32)
        squares += tl.sum(z * z, 1)
    if NORMED:
        factor = (1.0 / tl.sqrt(squares / DIM + eps))[:, None]
        if ROTATED > 0:
            its = half < ROTATED // 2
            x = x * factor * tl.load(weight + step * half, mask=its, other=0.0).to(tl.float32)[None, :]
            y = y * factor * tl.load(weight + step * half + second, mask=its, other=0.0).to(tl.float32)[None, :]
            x, y = x.to(kind).to(tl.float32), y.to(kind).to(tl.float32)
        if ROTATED < DIM:
            z = z * factor * tl.load(weight + rest, mask=rest < DIM, other=0.0).to(tl.float32)[None, :]
    if ROTATED > 0:
        its = half < ROTATED // 2
        cosine = tl.load(cosines + half, mask=its, other=0.0).to(tl.float32)[None, :]
        sine = tl.load(sines + half, mask=its, other=0.0).to(tl.float32)[None, :]
        tl.store(write + (step * half)[None, :], (x * cosine - y * sine).to(kind), mask=turned)
        tl.store(write + (step * half + second)[None, :], (y * cosine + x * sine).to(kind), mask=turned)
    if ROTATED < DIM:
        tl.store(write + rest[None, :], z.to(kind), mask=left)


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
    block = min(triton.next_power_of_2(heads), max(1, TILE // triton.next_power_of_2(max(dim, width))))
    makes = cosines is not None or norms is not None
    made, tiles = (queries.new_empty(tokens, heads, dim), triton.cdiv(heads, block)) if makes else (queries, 0)
    cosines, sines = (queries, queries) if cosines is None else (cosines, sines)
    weights = (queries, queries) if norms is None else norms
    pads = (triton.next_power_of_2(max(1, size)) for size in (rotated // 2, dim - rotated, width))
    make_and_write[(tokens, tiles + triton.cdiv(key_heads, block))](
        queries, keys, values, made, key_array, value_array, rows, cosines, sines, *weights,
        *queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2], key_array.stride(0), value_array.stride(0),
        cosines.stride(0), sines.stride(0), eps, heads, key_heads, dim, width, rotated, pairs, norms is not None,
        tiles, block, *pads, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return made
