"""A family's functions, called with what travels: hidden states alone are a tensor to a family, a bundle is a dict of arrays."""

from collections.abc import Mapping
from typing import Any

import torch

from noria.engine.batch import Microbatch, Network
from noria.engine.layer_cache import LayerCache
from noria.ring.messages import Arrays


class Layers:
    """Knows which arrays a border has, and in which order they travel."""

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
        return self._arrays(layer + 1, self._model.layer(self._shape, layer, parameters, given, its.positional, cache))

    def head(self, parameters: Mapping[str, torch.Tensor], part: Arrays) -> torch.Tensor:
        """Logits [S, V] of these rows of what the last layer left."""
        return self._model.head(self._shape, parameters, self._given(self._shape.num_layers, part))

    def _given(self, border: int, part: Arrays) -> torch.Tensor | dict[str, torch.Tensor]:
        return dict(zip(self._names[border], part, strict=True)) if self._names else part[0]

    def _arrays(self, border: int, found: Any) -> Arrays:
        return tuple(found[name] for name in self._names[border]) if self._names else (found,)
