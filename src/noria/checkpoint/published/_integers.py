"""Matrices of whole numbers of 4 or 8 bits with scales of groups of inputs, as several formats have them.

A format says how its tensors unpack; the fields are those of encodings/_integers.py: codes that are 0 or more, [outputs, inputs],
zeros and scales [outputs, groups].
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from noria.checkpoint.published._tensors import Published
from noria.checkpoint.tensor_files import Reader, Tensor
from noria.encodings import Fields
from noria.errors import require

SCALES = ("bfloat16", "float16", "float32")
BITS = (4, 8)
Read = Callable[[Reader], torch.Tensor]


def group_of(said: Any, key: str) -> int:
    """The size of a group: a multiple of 16, or -1 for a whole row. Raises InputError for one that Noria does not store."""
    size = -1 if said is None else said
    right = type(size) is int and (size == -1 or (16 <= size < 2**31 and size % 16 == 0))
    require(right, f"{key} is {str(said)[:80]}: Noria stores groups of multiples of 16 inputs, and whole rows (-1)")
    return int(size)


def groups(inputs: int, size: int) -> int:
    """How many groups a row has."""
    return 1 if size == -1 else -(-inputs // size)


def published(
    module: str,
    bits: int,
    shape: tuple[int, int],
    group_size: int,
    tensors: Mapping[str, Tensor | None],
    read: Mapping[str, Read],
    symmetric: bool,
) -> Published:
    """A matrix of these tensors, by what they are for: codes, scales, and perhaps zeros and g_idx.

    `read` gives codes as bytes as they are stored, scales and zeros [outputs, groups]; without zeros among them they are the
    middle. symmetric: zeros that are there must be the middle, and are not stored. g_idx [inputs]: the group of each input.
    """
    held = {name: tensor for name, tensor in tensors.items() if tensor}
    scale, index = held["scales"], held.get("g_idx")
    settings = {
        "group_size": group_size,
        "symmetric": symmetric,
        "permuted": index is not None,
        "scale_dtype": scale.dtype,
    }

    def fields(reader: Reader) -> Fields:
        found = {name: its(reader).contiguous() for name, its in read.items()}
        if symmetric and "zeros" in found:
            middle = 2 ** (bits - 1)
            wrong = found.pop("zeros") != middle
            zeros = held["zeros"]
            require(
                not bool(wrong.any()),
                f"{zeros.shard}: {zeros.name!r} has {int(wrong.sum())} zeros that are not {middle}, but config.json says that"
                " the form is symmetric: they do not belong together",
            )
        if index is not None:
            found["permutation"] = permutation(reader.whole(index), index, group_size, shape[1])
        return found

    return Published(module, f"int{bits}", settings, shape, tuple(held.values()), fields)


def permutation(group_of_input: torch.Tensor, index: Tensor, size: int, inputs: int) -> torch.Tensor:
    """The place of each input in the order of its groups, int32. Raises InputError for groups of other sizes."""
    if bool((group_of_input == -1).all()):  # what compressed-tensors writes where nothing was ordered
        return torch.arange(inputs, dtype=torch.int32)
    places = group_of_input.long().argsort(stable=True).argsort()
    size = inputs if size == -1 else size
    require(
        bool((places // size == group_of_input).all()),
        f"{index.shard}: {index.name!r} does not name {groups(inputs, size)} groups of {size} inputs each, as config.json"
        " says that there are",
    )
    return places.int()


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits in words int32 [R, W], the lowest bits first: uint8 [R, 8 * W]."""
    content = _content(words)
    return torch.stack((content & 15, content >> 4), -1).flatten(-2)


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, uint8 [R, I], two a byte, the first in the low half."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


def bytes_of(words: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """Words int32 [R, W] of codes along the inputs, the lowest bits first, as bytes of so many inputs."""
    return _content(words)[:, : -(-inputs * bits // 8)]


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in words int32 [R, W], the lowest bits first, a byte each."""
    return nibbles(words) if bits == 4 else _content(words)


def _content(words: torch.Tensor) -> torch.Tensor:
    """The bytes of words int32 [R, W]: uint8 [R, 4 * W]. Flat in between, as a column of one row has any stride."""
    return words.contiguous().view(-1).view(torch.uint8).view(len(words), -1)
