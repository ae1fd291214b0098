"""GPTQ as AutoGPTQ and GPTQModel write it: `qweight` int32 [inputs / per word, outputs], `qzeros` int32 [groups, outputs / per
word], `scales` [groups, outputs], `g_idx` int32 [inputs].

GPTQModel's nn_modules/qlinear/__init__.py (pack, dequantize_weight) and utils/model.py. Of two conventions of zeros the older,
checkpoint_format gptq, stores each less one; GPTQModel adds the ones to whole words, with carries, and so does Noria. gptq_v2
stores them as they are. A number is (code - zero) x scale of its input's group.
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.checkpoint.published import _integers
from noria.checkpoint.published._tensors import Published, Tensors, hold
from noria.checkpoint.tensor_files import Reader, Tensor
from noria.errors import InputError, require
from noria.models._config import shown

METHODS = ("gptq",)
LAYOUTS = {"gptq": True, "gptq_v2": False}  # whether zeros are stored less one


class Gptq:
    """The matrices of a directory of GPTQ."""

    ASIDE: tuple[str, ...] = ()
    activations, cache = "", ""

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors):
        self._tensors = tensors
        bits = settings.get("bits")
        require(
            type(bits) is int and bits in _integers.BITS, f"bits is {shown(bits)}: Noria reads GPTQ of 4 and 8 bits"
        )
        self._bits = int(bits or 0)
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        marlin = settings.get("is_marlin_format")
        require(
            isinstance(layout, str) and layout in LAYOUTS and not marlin,
            f"checkpoint_format is {shown('marlin' if marlin else layout)}: Noria reads gptq and gptq_v2",
        )
        require(
            settings.get("pack_dtype") in (None, "int32"),
            f"pack_dtype is {shown(settings.get('pack_dtype'))}: Noria reads int32",
        )
        _refuse_overrides(settings.get("dynamic"))
        self._less_one = LAYOUTS[layout]
        self._group_size = _integers.group_of(settings.get("group_size", -1), "group_size")
        self._symmetric, self._ordered = settings.get("sym", True) is True, settings.get("desc_act", False) is True
        size = f"groups of {self._group_size}" if self._group_size > 0 else "whole rows"
        self.words = f"gptq of {self._bits} bits by {size}"

    def matrix(self, module: str, number: int | None = None) -> Published | None:
        """Codes, scales, zeros unless symmetric, and a permutation if the inputs were ordered."""
        weight = self._tensors.named(f"{module}.qweight")
        if weight is None or number is not None:
            return None
        plain = self._tensors.named(f"{module}.weight")
        require(not plain, f"{weight.shard}: {weight.name!r} stands beside {module + '.weight'!r}: which is right?")
        return self._published(module, weight)

    def _published(self, module: str, weight: Tensor) -> Published:
        each = 32 // self._bits
        require(len(weight.shape) == 2, f"{weight.shard}: {weight.name!r} is {list(weight.shape)}, no matrix")
        inputs, outputs = weight.shape[0] * each, weight.shape[1]
        hold(weight, ("int32",), (weight.shape[0], outputs), "as qweight")
        groups, why = _integers.groups(inputs, self._group_size), f"of {self.words}, [{outputs}, {inputs}]"
        scales = hold(self._need(weight, module, "scales"), _integers.SCALES, (groups, outputs), why)
        require(outputs % each == 0, f"{weight.shard}: {weight.name!r} has {outputs} outputs, no multiple of {each}")
        zeros = hold(self._need(weight, module, "qzeros"), ("int32",), (groups, outputs // each), why)
        index = self._index(module, weight, inputs)

        def codes(reader: Reader) -> torch.Tensor:
            if index is not None and not self._ordered:
                _check_in_order(reader.whole(index), index, self._group_size)
            return _integers.bytes_of(reader.whole(weight).t(), self._bits, inputs)

        read = {
            "codes": codes,
            "scales": lambda reader: reader.whole(scales).t(),
            "zeros": lambda reader: self._zeros(reader.whole(zeros)),
        }
        kept = {"codes": weight, "scales": scales, "zeros": zeros, "g_idx": index if self._ordered else None}
        made = _integers.published(
            module, self._bits, (outputs, inputs), self._group_size, kept, read, symmetric=self._symmetric
        )
        return made if self._ordered or index is None else made.using(index)

    def _need(self, weight: Tensor, module: str, ending: str) -> Tensor:
        return self._tensors.need(weight, f"{module}.{ending}")

    def _index(self, module: str, weight: Tensor, inputs: int) -> Tensor | None:
        found = self._tensors.named(f"{module}.g_idx")
        if found is None:
            require(not self._ordered, f"{weight.shard}: desc_act is true, and {module + '.g_idx'!r} is missing")
            return None
        return hold(found, ("int32", "int64"), (inputs,), "one for each input")

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        ones = 0x11111111 if self._bits == 4 else 0x01010101
        return _integers.unpacked(words + ones if self._less_one else words, self._bits).t()


FORMAT = Gptq


def _refuse_overrides(dynamic: Any) -> None:
    """Raises InputError for modules with settings of their own; those that are left plain (`-:`) their tensors show."""
    own = [key for key in dynamic or () if not str(key).startswith("-:")]
    if own:
        raise InputError(
            f"dynamic gives {shown(own[0])} settings of its own, which this version of Noria does not read"
        )


def _check_in_order(group_of_input: torch.Tensor, index: Tensor, size: int) -> None:
    """Raises InputError for inputs in another order than that of their groups."""
    inputs = len(group_of_input)
    order = torch.arange(inputs) // (inputs if size == -1 else size)
    require(
        bool((order == group_of_input).all()),
        f"{index.shard}: {index.name!r} does not name groups of {inputs if size == -1 else size} inputs in order, though desc_act"
        " is false in config.json: if the model was made with it, set it to true",
    )
