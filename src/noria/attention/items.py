"""Attention over work items (kernels/): decode, chunks, prefill and shared beginnings by one kernel on CUDA devices.

A plan is the rows of a microbatch; lists are made of it when the first layer of a shape and window asks for them, and
serve all others. Knows nothing of models and steps.
"""

from dataclasses import replace
from functools import lru_cache
from types import ModuleType

import torch

from noria import kinds
from noria.attention import sdpa
from noria.attention._lists import HeldLists, Lists
from noria.attention._ragged import ragged
from noria.kernels import coded
from noria.kernels.coded import Coded
from noria.kernels.scoring import HeadShape, Scoring, ScoringKind
from noria.kernels.trying import tried
from noria.kernels.work import LEAST_TILE, WIDE_TILE, RaggedRows
from noria.step import PAGE_TOKENS, Run, Span

DTYPES = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256
WIDEST_LATENT = 512  # of a value within a key, and WIDEST_REST of the key's other numbers
WIDEST_REST = 128
CAPABILITY = (8, 0)  # Ampere
LARGEST_ERROR = 0.1  # of attended numbers of about 1 in half precisions: more is no rounding


def refuses(device: torch.device, dtype: torch.dtype, heads: HeadShape, scored: frozenset[ScoringKind]) -> str:
    """Why such heads are not computed here; empty where they are. What they need is built then."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is the {device.type.upper()}"
    if dtype not in DTYPES:
        return f"it computes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if why := _too_wide(heads):
        return why
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it needs a GPU of compute capability 8.0"
    return _unbuilt(device, dtype, heads, scored)


def _too_wide(heads: HeadShape) -> str:
    """Why heads of these sizes are not computed; empty where they are."""
    if heads.within:
        rest = heads.dim - heads.width
        if heads.num_key_heads > 1 or rest % 8 or heads.width % 8 or rest > WIDEST_REST or heads.width > WIDEST_LATENT:
            most = f"of up to {WIDEST_LATENT} numbers with up to {WIDEST_REST} more, in steps of 8"
            return f"it computes values within one key head {most}, not {heads.width} and {rest}"
        return ""
    if any(size % 8 or not 8 <= size <= WIDEST_HEAD for size in (heads.dim, heads.width)):
        return f"it computes head sizes of 8 to {WIDEST_HEAD} in steps of 8, not {heads.dim} and {heads.width}"
    return f"it computes {WIDE_TILE} heads to a key head, not {heads.group}" if heads.group > WIDE_TILE else ""


@lru_cache
def _unbuilt(device: torch.device, dtype: torch.dtype, heads: HeadShape, scored: frozenset[ScoringKind]) -> str:
    """Why kernels for such heads cannot be built or are wrong; empty where they are right. They are built once."""

    def trial() -> str:
        largest = _largest_error(device, dtype, heads)
        for one in scored:
            _kernel().build(device, dtype, _in_parts(heads), one)
        return "" if largest < LARGEST_ERROR else "it gives other results than sdpa"

    return tried(trial)


@lru_cache
def refuses_coded(
    device: torch.device, dtype: torch.dtype, heads: HeadShape, scored: frozenset[ScoringKind], form: str
) -> str:
    """Why such heads, which are computed here, do not attend to a cache in this form; empty where they do. What they need is
    built then."""
    if heads.within:
        return "values lie within keys"

    def trial() -> str:
        for one in scored:
            _kernel().build(device, dtype, heads, one, form)
        return "" if _same_bits(device, dtype, heads, form) else "it gives other bits than what is decoded before"

    return tried(trial)


def _same_bits(device: torch.device, dtype: torch.dtype, heads: HeadShape, form: str) -> bool:
    """Whether a row's keys and values attend alike coded and decoded before."""
    rounded, draw = kinds.load("kernels", "rounded"), torch.Generator().manual_seed(0)
    spans, pages = [Span(0, 3, 200, (Run(0, 16),))], torch.arange(16, device=device)
    rows, plain, codes = PAGE_TOKENS * len(pages), [], []
    for array in _kernel().arrays(heads, form):
        its = coded.zeros(array, rows, device)
        new = torch.randn(rows, *array.row, generator=draw) * torch.logspace(-2, 1, rows)[:, None, None]
        rounded.write(form, torch.arange(rows, device=device), (its.fields, array.group, new.to(device, dtype)))
        plain.append(torch.empty(rows, *array.row, dtype=dtype, device=device))
        rounded.decode(form, its.fields, array.group, pages, plain[-1])
        codes.append(its)
    plan, scores = prepare(spans, device), Scoring(heads.dim**-0.5)
    queries = torch.randn(3, heads.num_heads, heads.dim, generator=draw).to(device, dtype)
    expected = attention(plan, queries, plain[0], plain[1], scores)
    return torch.equal(attention(plan, queries, codes[0], codes[1], scores), expected)


def _largest_error(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> float:
    """The largest difference to what sdpa gives for one row of two sections, which few programs share."""
    spans, draw = [Span(0, 3, 1100, (Run(0, 70),))], torch.Generator().manual_seed(0)
    queries = torch.randn(3, heads.num_heads, heads.dim, generator=draw).to(device, dtype)
    keys, values = (
        torch.randn(70 * PAGE_TOKENS, heads.num_key_heads, size, generator=draw).to(device, dtype)
        for size in (heads.dim, heads.width)
    )
    values = keys[..., : heads.width] if heads.within else values
    scores = Scoring(heads.dim**-0.5)
    found = attention(prepare(spans, device), queries, keys, values, scores)
    return float((found - sdpa.attention(sdpa.prepare(spans, device), queries, keys, values, scores)).abs().max())


def prepare(spans: list[Span], device: torch.device) -> Lists:
    """The rows of a microbatch, whose runs of pages are whole blocks of keys (limits.RUN_PAGES)."""
    return Lists(ragged(spans), device)


def of_rows(rows: RaggedRows, device: torch.device) -> Lists:
    """The same, of rows that are arrays already."""
    return Lists(rows, device)


def held(device: torch.device) -> HeldLists:
    """A plan whose lists stay where they are, for calls that are recorded once: it takes the lists of others."""
    return HeldLists(device)


def attention(
    plan: Lists | HeldLists,
    queries: torch.Tensor,
    key_cache: torch.Tensor | Coded,
    value_cache: torch.Tensor | Coded,
    scores: Scoring,
) -> torch.Tensor:
    """[T, H, Dv]: each query attends to its own sequence's keys up to itself, the last `window` of them if given.

    queries [T, H, D]; caches [rows, Hkv, D] and [rows, Hkv, Dv] of one layer, in which the new tokens already lie;
    or both of them coded, where `refuses_coded` does not refuse it; or values the first numbers of the keys.
    """
    kernel, heads = _kernel(), HeadShape.of(queries, key_cache, value_cache)
    if heads.within:
        heads = _in_parts(heads)
        key_cache, value_cache = (_shared(its, heads.num_key_heads) for its in (key_cache, value_cache))
    its_lists = plan.of(heads, scores.window, lambda: kernel.packing(plan.device, heads, scores.window))
    attended: torch.Tensor = kernel.attend(its_lists, queries, key_cache, value_cache, scores)
    return attended


def _shared(cache: torch.Tensor | Coded, heads: int) -> torch.Tensor:
    """[rows, heads, ...]: one key head as so many in the same memory."""
    assert isinstance(cache, torch.Tensor), "values lie within plain keys alone"
    return cache.expand(-1, heads, -1)


def _in_parts(heads: HeadShape) -> HeadShape:
    """Wide values leave no registers for wide tiles: their one key head as several, each for as many queries as a tile holds."""
    if not heads.within:
        return heads
    group = heads.num_heads
    parts = next(parts for parts in range(-(-group // LEAST_TILE), group + 1) if group % parts == 0)
    return replace(heads, num_key_heads=parts)


@lru_cache
def _kernel() -> ModuleType:
    """What launches the kernel: it needs triton, which is there where there is a GPU."""
    return kinds.load("kernels", "attend")
