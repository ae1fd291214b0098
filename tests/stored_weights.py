"""Weights in every encoding whose tiles kernels decode themselves, of several parts: for Triton's interpreter and for GPUs."""

import torch

from noria import encodings, kinds
from noria.blocks import Parameter
from noria.kernels.as_stored import StoredWeight
from noria.pieces import Matrix
from stored_cases import FORMS


def parameter_of(name, parts, inputs):
    """A parameter [sum of parts, inputs] in one of FORMS, whose matrices have so many outputs each."""
    encoding, said = FORMS[name]
    settings = kinds.load("encodings", encoding).DEFAULTS | said
    matrices = [Matrix("", (outputs, inputs)) for outputs in parts]
    piece = encodings.capacity(encoding, matrices, "bfloat16", settings)
    return Parameter("weight", (sum(parts), inputs), "bfloat16", encoding, 1, piece, settings=settings)


def made(name, parts, inputs, rows, dtype, device="cpu"):
    """Hidden states [rows, inputs], the weight as it is stored, its numbers, and a bias."""
    its, draw = parameter_of(name, parts, inputs), torch.Generator().manual_seed(inputs + rows)
    numbers = [torch.randn(outputs, inputs, generator=draw) * inputs**-0.5 for outputs in parts]
    fields = encodings.encode(its.encoding, its.piece.matrices, numbers, its.settings)
    pieces = encodings.packed(its.piece, fields)[None].to(device)
    decoded = torch.empty(its.shape, dtype=dtype, device=device)
    encodings.decode(its, pieces, {"weight": decoded})
    hidden, bias = torch.randn(rows, inputs, generator=draw), torch.randn(sum(parts), generator=draw)
    return hidden.to(device, dtype), encodings.in_tiles(its, pieces, "weight"), decoded, bias.to(device, dtype)


def numbers_of(value):
    """All numbers of what a layer computes with: a tensor, a weight that may come as it is stored, or pieces."""
    if isinstance(value, torch.Tensor):
        return value
    return value.decoded() if isinstance(value, StoredWeight) else value.of(range(len(value)))
