"""AWQ as AutoAWQ writes it, layout GEMM: `qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups, outputs / 8], `scales`
[groups, outputs]; the eight codes of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7, the lowest bits first.

AutoAWQ's modules/linear/gemm.py and utils/packing_utils.py. A number is (code - zero) x scale.
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.checkpoint.published import _integers
from noria.checkpoint.published._tensors import Published, Tensors, hold
from noria.checkpoint.tensor_files import Reader, Tensor
from noria.errors import require
from noria.models._config import shown

METHODS = ("awq",)
BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each output's code stands


class Awq:
    """The matrices of a directory of AWQ."""

    ASIDE: tuple[str, ...] = ()
    activations, cache = "", ""

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors):
        self._tensors = tensors
        bits = settings.get("bits", settings.get("w_bit", BITS))
        require(bits == BITS, f"bits is {shown(bits)}: Noria reads AWQ of 4 bits")
        layout = str(settings.get("version") or settings.get("format") or settings.get("checkpoint_format") or "gemm")
        require(layout.lower() == "gemm", f"version is {shown(layout)}: Noria reads the layout gemm")
        size = settings.get("group_size", settings.get("q_group_size", 128))
        self._group_size = _integers.group_of(size, "group_size")
        self.words = f"awq of 4 bits by {f'groups of {size}' if self._group_size > 0 else 'whole rows'}"

    def matrix(self, module: str, number: int | None = None) -> Published | None:
        """Codes, scales and zeros."""
        weight = self._tensors.named(f"{module}.qweight")
        if weight is None or number is not None:
            return None
        plain = self._tensors.named(f"{module}.weight")
        require(not plain, f"{weight.shard}: {weight.name!r} stands beside {module + '.weight'!r}: which is right?")
        require(len(weight.shape) == 2, f"{weight.shard}: {weight.name!r} is {list(weight.shape)}, no matrix")
        inputs, words = weight.shape
        hold(weight, ("int32",), (inputs, words), "as qweight")
        groups, why = _integers.groups(inputs, self._group_size), f"of {self.words}, [{8 * words}, {inputs}]"
        scales = hold(self._need(weight, module, "scales"), _integers.SCALES, (groups, 8 * words), why)
        zeros = hold(self._need(weight, module, "qzeros"), ("int32",), (groups, words), why)
        read = {
            "codes": lambda reader: _codes(reader, weight),
            "scales": lambda reader: reader.whole(scales).t(),
            "zeros": lambda reader: _unpacked(reader.whole(zeros)).t(),
        }
        kept = {"codes": weight, "scales": scales, "zeros": zeros}
        return _integers.published(module, BITS, (8 * words, inputs), self._group_size, kept, read, symmetric=False)

    def _need(self, weight: Tensor, module: str, ending: str) -> Tensor:
        return self._tensors.need(weight, f"{module}.{ending}")


FORMAT = Awq


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [R, outputs] of words [R, outputs / 8]."""
    return _integers.nibbles(words).unflatten(1, (-1, 8))[:, :, list(PLACES)].flatten(1)


def _codes(reader: Reader, weight: Tensor) -> torch.Tensor:
    return _integers.halves(_unpacked(reader.whole(weight)).t())
