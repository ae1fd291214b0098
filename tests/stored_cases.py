"""Experts in every encoding whose tiles kernels decode themselves: for Triton's interpreter and for GPUs."""

from dataclasses import replace
from typing import Any

import torch

import expert_checks
from noria import encodings, kinds
from noria.blocks import Parameter
from noria.kernels.expert_layer import ExpertLayer
from noria.pieces import Matrix

SYMMETRIC = {"group_size": 32, "symmetric": True, "permuted": False, "scale_dtype": "bfloat16"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "nvfp4 that divides": ("nvfp4", {"tensor_scale": "divides"}),
    "fp8 blocks": ("fp8_block", {}),
    "fp8 blocks of powers": ("fp8_block", {"block_size": [32, 64], "scale_dtype": "e8m0"}),
    "fp8 channels": ("fp8_channel", {}),
    "int4": ("int4", {}),
    "int4 of 32, symmetric": ("int4", SYMMETRIC),
    "int4 of a row": ("int4", {"group_size": -1, "scale_dtype": "float32"}),
    "int4 of 128": ("int4", {"group_size": 128, "scale_dtype": "float16"}),
    "int8": ("int8", {}),
    "int8, symmetric": ("int8", SYMMETRIC | {"group_size": -1}),
}


def made(name, case, dtype, device="cpu"):
    """Rows [T, E], choices and weights [T, C], the layer with decoded matrices, and with matrices as they are stored."""
    encoding, said = FORMS[name]
    settings = kinds.load("encodings", encoding).DEFAULTS | said
    rows, chosen, weights, layer = expert_checks.made(replace(case, lies="decoded"), torch.float32)
    rows, weights = rows.to(device, dtype), weights.to(device)
    inner, hidden, alternating = case.inner, case.hidden, case.gate.alternating
    ups = [(2 * inner, hidden)] if alternating else [(inner, hidden)] * 2
    matrices = [*(Matrix("gate_up", shape) for shape in ups), Matrix("down", (hidden, inner))]
    piece = encodings.capacity(encoding, matrices, str(dtype).removeprefix("torch."), settings)
    parts = [
        [*gate_up.split([shape[0] for shape in ups]), down]
        for gate_up, down in zip(layer.gate_up, layer.down, strict=True)
    ]
    each = [encodings.packed(piece, encodings.encode(encoding, matrices, its, settings)) for its in parts]
    pieces, shape = torch.stack(each).to(device), (case.experts, 3 * inner, hidden)
    experts = Parameter("experts", shape, "bfloat16", encoding, case.experts, piece, settings=settings)
    into = {f"experts.{which}": getattr(layer, which).to(device, dtype) for which in ("gate_up", "down")}
    encodings.decode(experts, pieces, into)
    biases = layer.biases and tuple(its.to(device, dtype) for its in layer.biases)
    found = [
        ExpertLayer(its["experts.gate_up"], its["experts.down"], case.gate, biases)
        for its in (into, {name: encodings.in_tiles(experts, pieces, name) for name in into})
    ]
    return rows, chosen.to(device), weights, *found
