"""A family's functions, called with what travels: hidden states alone are a tensor to a family, a bundle is a dict of arrays."""

from collections.abc import Mapping
from typing import Any

import torch

from noria.arrays import Array
from noria.bundle import typed
from noria.engine.batch import Microbatch, Network
from noria.engine.layer_cache import LayerCache
from noria.ring.messages import Arrays


class Layers:
    """Knows which arrays a border has, and in which order they travel. Asserts that a family returns what it says."""

    def __init__(self, network: Network):
        self._model, self._shape = network.model, network.shape
        self._names = [("hidden", *(array.name for array in arrays)) for arrays in network.shape.bundle]

    def embed(self, parameters: Mapping[str, torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor) -> Arrays:
        """What goes into the first layer, of tokens [T]."""
        return self._arrays(0, self._model.embed(self._shape, parameters, token_ids, positions))

    def layer(
        self, layer: int, parameters: Mapping[str, torch.Tensor], part: Arrays, its: Microbatch, cache: LayerCache
    ) -> Arrays:
        """A microbatch's part after a layer, from the part before it, which is left as it is."""
        given = self._given(layer, part)
        found = self._arrays(layer + 1, self._model.layer(self._shape, layer, parameters, given, its.positional, cache))
        _agree("hidden", found[0], part[0].shape, part[0].dtype)
        return found

    def entry(self, layer: int) -> tuple[tuple[Array, ...], bool]:
        """The arrays that a layer reads, and whether they are another layer's."""
        source = self._shape.reads(layer)
        return self._shape.arrays(source), source != layer

    def head(self, parameters: Mapping[str, torch.Tensor], part: Arrays) -> torch.Tensor:
        """Logits [S, V] of these rows of what the last layer left."""
        return self._model.head(self._shape, parameters, self._given(self._shape.num_layers, part))

    def _given(self, border: int, part: Arrays) -> torch.Tensor | dict[str, torch.Tensor]:
        return dict(zip(self._names[border], part, strict=True)) if self._names else part[0]

    def _arrays(self, border: int, found: Any) -> Arrays:
        if not self._names:
            return (found,)
        names = self._names[border]
        what = ", ".join(found) if isinstance(found, dict) else "no dict of arrays"
        assert isinstance(found, dict) and found.keys() == {*names}, (
            f"{what} at border {border}: {', '.join(names)} travel"
        )
        hidden, run = found["hidden"], str(found["hidden"].dtype).removeprefix("torch.")
        for array in self._shape.bundle[border]:
            kind = getattr(torch, typed(array, run).dtype or "")
            _agree(array.name, found[array.name], (len(hidden), *array.row), kind)
        return tuple(found[name] for name in names)


def _agree(name: str, found: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    its = found.shape, found.dtype
    assert its == (shape, dtype), f"{name} is {found.dtype} {list(found.shape)}, what travels is {dtype} {list(shape)}"
