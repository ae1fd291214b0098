"""MXFP4 as gpt-oss is published: the experts of a layer in one tensor, `NAME_blocks` uint8 [experts, outputs, groups, 16] and
`NAME_scales` uint8 [experts, outputs, groups], a power of two for 32 inputs (transformers' integrations/mxfp4.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noria.checkpoint.published._floats import MXFP4_GROUP, mxfp4
from noria.checkpoint.published._tensors import Published, Tensors, hold
from noria.checkpoint.tensor_files import slice_of
from noria.errors import require

METHODS = ("mxfp4",)


class Mxfp4:
    """The experts of a directory in MXFP4."""

    ASIDE: tuple[str, ...] = ()
    words, activations, cache = "mxfp4", "", ""

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors):
        self._tensors = tensors

    def matrix(self, module: str, number: int | None = None) -> Published | None:
        """Expert `number` of a tensor of all of them."""
        blocks = self._tensors.named(f"{module}_blocks")
        if blocks is None or number is None:
            return None
        scales = self._tensors.need(blocks, f"{module}_scales")
        right = len(blocks.shape) == 4 and blocks.shape[3] == MXFP4_GROUP // 2 and number < blocks.shape[0]
        require(
            right,
            f"{blocks.shard}: {blocks.name!r} is {list(blocks.shape)}, it should be [experts, outputs, groups,"
            f" {MXFP4_GROUP // 2}] with more than {number} experts",
        )
        experts, outputs, groups, half = blocks.shape
        hold(scales, ("uint8",), (experts, outputs, groups), f"one for {MXFP4_GROUP} inputs of {blocks.name!r}")
        codes = replace(slice_of(blocks, number), shape=(outputs, groups * half))
        return mxfp4(f"{module}[{number}]", codes, slice_of(scales, number))


FORMAT = Mxfp4
