"""A model on one device without engine: its blocks gathered by `sources` of tensors, an array of each of its caches."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from noria import models
from noria.attention import sdpa
from noria.blocks import lay_out, layer_name
from noria.engine.layer_cache import LayerCache
from noria.engine.parameters import stored, views
from noria.models._sources import Slice, turned
from noria.step import PAGE_TOKENS, Run, Span


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, count).tolist()


def source_of(state, name):
    """What a family's name of a source means."""
    tensor = state[str(name)]
    tensor = tensor[name.number] if isinstance(name, Slice) else tensor
    return tensor.T if turned(name) else tensor


def _by_name(travels):
    """What travels between layers: hidden states alone, or a bundle."""
    return travels if isinstance(travels, dict) else {"hidden": travels}


class Whole:
    """A model of a config.json and tensors by name; arrays [rows, ...] of each layer, NaN until they are written."""

    def __init__(self, config, state, dtype, num_pages=64, device="cpu"):
        self.model = models.for_config(config)
        self.shape = self.model.shape(config)
        self.dtype, self.device = dtype, torch.device(device)
        self.embed = self.block(state, "embed", self.model.embed_parameters(self.shape))
        self.head = self.block(state, "head", self.model.head_parameters(self.shape))
        layers = range(self.shape.num_layers)
        self.layers = [
            self.block(state, layer_name(layer), self.model.layer_parameters(self.shape, layer)) for layer in layers
        ]
        rows = num_pages * PAGE_TOKENS
        self.arrays = [
            {
                one.name: torch.full(
                    (rows, *((1,) * (len(one.row) == 1)), *one.row), torch.nan, dtype=dtype, device=device
                )
                for one in self.shape.arrays(layer)
            }
            for layer in layers
        ]

    def block(self, state, name, shapes):
        """The block's computed tensors, of the tensors that make it."""
        layout = lay_out(name, shapes, str(self.dtype).removeprefix("torch."))
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self.device)
        numbers = stored(buffer, layout)
        sources = self.model.sources(self.shape, name)
        assert list(sources) == list(shapes)
        for parameter, tensors in sources.items():
            rows = torch.cat([source_of(state, name).flatten() for name in tensors])
            assert len(rows) == numbers[parameter].numel(), parameter
            numbers[parameter].copy_(rows.view(numbers[parameter].shape))
        return views(buffer, layout)

    def attention(self, layer, plan, queries, keys, values, scores):
        """As sdpa; scored in the way that the shape says of this layer, for which kernels are compiled."""
        said = self.shape.soft_cap, layer in self.shape.sinks
        assert said == (scores.soft_cap, scores.sinks is not None), f"layer {layer} of {self.shape.family}"
        return sdpa.attention(plan, queries, keys, values, scores)

    def logits(self, parts: list[tuple[list[int], int, tuple[Run, ...]]]) -> list[torch.Tensor]:
        """One forward call. `parts`: new tokens, position of the first, pages of each sequence. Logits of each part."""
        spans, rows, first = [], [], 0
        for tokens, start, runs in parts:
            spans.append(Span(first, len(tokens), start + len(tokens), runs))
            pages = [page for run in runs for page in range(run.start, run.start + run.count)]
            positions = range(start, start + len(tokens))
            rows += [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in positions]
            first += len(tokens)
        token_ids = torch.tensor([token for tokens, _, _ in parts for token in tokens], device=self.device)
        positions = torch.cat([torch.arange(start, start + len(tokens)) for tokens, start, _ in parts]).to(self.device)
        positional = self.model.positional(self.shape, positions, self.dtype)
        plan = sdpa.prepare(spans, self.device)
        microbatch = SimpleNamespace(rows=torch.tensor(rows, device=self.device), attention_plan=plan, states=None)
        hidden = self.model.embed(self.shape, self.embed, token_ids, positions)
        for index, parameters in enumerate(self.layers):
            reads = self.shape.reads(index)
            kind = SimpleNamespace(attention=partial(self.attention, index))
            cache = LayerCache(kind, microbatch, self.arrays[reads], self.shape.arrays(reads), tied=reads != index)
            before = {name: its.clone() for name, its in _by_name(hidden).items()}
            after = self.model.layer(self.shape, index, parameters, hidden, positional, cache)
            same = (torch.equal(before[name], its) for name, its in _by_name(hidden).items())
            assert all(same), "a layer must not write into its input"
            hidden = after
        logits = self.model.head(self.shape, self.head, hidden)
        return list(logits.split([len(tokens) for tokens, _, _ in parts]))
