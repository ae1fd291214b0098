"""Memory that does not suffice in one cell of a visit: a stand-in for a family's `layer`."""

from collections import Counter

import torch


class Shortage:
    """Memory does not suffice for microbatch `microbatch` of layer `layer`, once a visit, after the layer has written its
    keys and values. `computed`: token rows of each layer that came through; `failures`: how often it did not suffice.

    For visits of several layers from 0 on, and microbatches of two rows at least: of rows of one token, or of three.
    """

    def __init__(self, of_family, layer, microbatch):
        self.cell, self.computed, self.failures = (layer, microbatch), Counter(), 0
        self._at, self._armed, self._layer = (0, -1), True, of_family

    def __call__(self, shape, index, parameters, hidden, *more):
        self._armed = self._armed or index < self._at[0] or index == 0 == self._at[0] < self._at[1]
        self._at = index, self._at[1] + 1 if index == self._at[0] else 0
        given = [hidden] if isinstance(hidden, torch.Tensor) else list(hidden.values())
        before, rows = [array.clone() for array in given], len(given[0])
        found = self._layer(shape, index, parameters, hidden, *more)
        assert all(map(torch.equal, given, before)), "a layer must not write into its input: it may be cut finer"
        if self._armed and self._at == self.cell and rows not in (1, 3):
            self._armed, self._at, self.failures = False, (index, self._at[1] - 1), self.failures + 1
            raise torch.OutOfMemoryError("no room")
        self.computed[index] += rows
        return found
