"""A cache in fewer bits: rows rounded into their places, pages decoded side by side. Kernels do it on CUDA devices, each in one
launch and to the bits of the plain way.

An encoded array of a layer's cache (arrays.py) has fields [rows, Hkv, ...]: a matrix of all tokens and heads.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeAlias

import torch

from noria import kinds
from noria.arrays import Array
from noria.encodings import _kernels
from noria.kernels.trying import tried
from noria.step import PAGE_TOKENS

Fields = Mapping[str, torch.Tensor]
Rows: TypeAlias = tuple[Array, Fields, torch.Tensor]  # of an array: its fields, and new rows [T, Hkv, D]
TRIED_PAGES = 5  # with which kernels are tried


def settings_of(array: Array) -> dict[str, Any]:
    """What an encoded array says to its encoding."""
    if array.encoding == "fp8_block":  # powers of two: a float's precision does not depend on them
        group = array.group if array.group > 0 else array.row[-1]
        return {"block_size": [1, group], "scale_dtype": "e8m0"}
    symmetric = array.encoding == "int8"
    return {"group_size": array.group, "symmetric": symmetric, "permuted": False, "scale_dtype": "bfloat16"}


def write(places: torch.Tensor, *given: Rows) -> None:
    """Rounds new rows [T, Hkv, D] of some arrays and writes them to their places [T]; two of one encoding by one kernel."""
    if all(_by_kernels(array, new) for array, _, new in given) and _alike(given):
        _kernel_write(places, *given)
        return
    for array, fields, new in given:
        if _by_kernels(array, new):
            _kernel_write(places, (array, fields, new))
        else:
            plain_write(places, (array, fields, new))


def _alike(given: tuple[Rows, ...]) -> bool:
    return len(given) == 2 and len({(array.encoding, *new.shape[:2], new.dtype) for array, _, new in given}) == 1


def plain_write(places: torch.Tensor, given: Rows) -> None:
    array, fields, new = given
    rounded = kinds.load("encodings", array.encoding or "").quick(new.reshape(-1, new.shape[-1]), settings_of(array))
    for name, its in rounded.items():
        fields[name].index_copy_(0, places, its.view(len(places), *fields[name].shape[1:]))


def decode(array: Array, fields: Fields, pages: torch.Tensor, into: torch.Tensor) -> None:
    """Decodes pages [P], one after another, into [P * 16, Hkv, D]."""
    (_kernel_decode if _by_kernels(array, into) else plain_decode)(array, fields, pages, into)


def plain_decode(array: Array, fields: Fields, pages: torch.Tensor, into: torch.Tensor) -> None:
    taken = {}
    for name, field in fields.items():
        its = field.view(-1, PAGE_TOKENS, *field.shape[1:]).index_select(0, pages)
        taken[name] = its.view(1, -1, field.shape[-1])
    its_decode, _ = _kernels.decoder(array.encoding or "", into.device, into.dtype)
    its_decode(taken, settings_of(array), into.view(1, -1, into.shape[-1]))


def without_kernels(entries: Collection[Sequence[Array]], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Builds the kernels of the encoded arrays of layers. A line for each reason for which torch does without them."""
    found = dict.fromkeys(refuses(array, device, dtype) for entry in entries for array in entry)
    nowhere = torch.zeros(0, dtype=torch.int64, device=device)
    for entry in entries:  # what rounds all of a layer's together
        rows = [torch.zeros(0, *_heads(array), dtype=dtype, device=device) for array in entry]
        fields = [{name: _empty(kept, 1, device) for name, kept in array.fields.items()} for array in entry]
        write(nowhere, *zip(entry, fields, rows, strict=True))
    return [f"the cache is rounded and decoded by torch, slower than by its kernels: {why}" for why in found if why]


def _by_kernels(array: Array, numbers: torch.Tensor) -> bool:
    return numbers.device.type == "cuda" and not refuses(array, numbers.device, numbers.dtype)


@lru_cache
def refuses(array: Array, device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels do not keep such an array, of numbers in this dtype; empty where they do. They are built and tried once."""
    if device.type != "cuda":
        return f"they need a CUDA device, this is the {device.type.upper()}"
    if dtype not in _kernels.DTYPES:
        return f"they take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return tried(lambda: "" if _gives_the_same(array, device, dtype) else "they give other bits", "they")


def _gives_the_same(array: Array, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels and torch leave the same codes of some rows, and make the same numbers of them."""
    rows, heads = TRIED_PAGES * PAGE_TOKENS, _heads(array)
    draw = torch.Generator().manual_seed(0)
    new = (
        torch.randn(rows - 9, *heads, generator=draw)
        .mul_(torch.logspace(-3, 3, rows - 9)[:, None, None])
        .to(device, dtype)
    )
    places, pages = torch.randperm(rows, generator=draw)[: len(new)].to(device), torch.arange(TRIED_PAGES - 1, -1, -1)
    made: list[list[torch.Tensor]] = []
    for ways in ((plain_write, plain_decode), (_kernel_write, _kernel_decode)):
        fields = {name: _empty(kept, rows, device) for name, kept in array.fields.items()}
        into = torch.zeros(rows, *heads, dtype=dtype, device=device)
        ways[0](places, (array, fields, new))
        ways[1](array, fields, pages.to(device), into)
        made.append([*(its.view(torch.uint8) for its in fields.values()), into])
    return all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def _heads(array: Array) -> tuple[int, ...]:
    """Hkv and D: a row of one vector is of one head."""
    return array.row if len(array.row) > 1 else (1, *array.row)


def _empty(kept: Array, rows: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(rows, *_heads(kept), dtype=getattr(torch, kept.computed("")), device=device)


def _kernel_write(places: torch.Tensor, *given: Rows) -> None:
    rows = ((fields, array.group, new.contiguous()) for array, fields, new in given)
    _kernel().write(given[0][0].encoding, places, *rows)


def _kernel_decode(array: Array, fields: Fields, pages: torch.Tensor, into: torch.Tensor) -> None:
    _kernel().decode(array.encoding, fields, array.group, pages, into)


@lru_cache
def _kernel() -> ModuleType:
    """What launches the kernels: it needs triton, which is there where there is a GPU."""
    return kinds.load("kernels", "rounded")
