"""The same bits in any batch, on a GPU in half precisions: products that add along their inputs in one order.

Torch's own settings choose these products (cuBLASLt, no split of the inputs), and a kernel of ours computes those that
choosing.py gives it; a check at the start is a guard, not a proof. Weights are multiplied as they are stored where that gives
the same bits.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from noria.blocks import Block
from noria.config import Config
from noria.kernels import as_stored, in_order
from noria.launch.building import build_attention, build_products, build_sampling, build_stored
from noria.launch.choosing import FEW, MANY, SOME, Linear, Product, chosen_products, differs, multiply, tensors_of
from noria.launch.here import ThisRank
from noria.limits import LOGITS_ROWS, padded_rows
from noria.model import OpenModel
from noria.models import _tiles

REDUCTIONS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
YES = "yes"


@contextlib.contextmanager
def exact_bits(
    config: Config, here: ThisRank, model: OpenModel, dtype: str, held: Mapping[str, Block]
) -> Iterator[dict[str, str]]:
    """Makes what is computed inside independent of what stands beside it in a batch, where the device can, and builds attention.

    held: the blocks whose encoded weights are as they are stored while the run computes.
    Yields the attribute that says so, `yes` or `no: ` and why; none on a CPU and in full precisions. Collective.
    """
    name, kind = build_attention(config, here, model.shape, dtype), getattr(torch, dtype)
    undrawn, multiplied = build_sampling(here, model.shape, dtype), build_products(here, dtype)
    with contextlib.ExitStack() as inside:
        if here.device.type != "cuda" or kind not in REDUCTIONS:
            yield {}
            return
        why = ""
        if not config.pipeline.exact_bits:
            why = "--no-exact-bits"
        elif name != "items":
            why = f"attention {name}"
        elif undrawn:
            why = "tokens are drawn by torch"
        elif model.shape.mixture_size and (multiplied or _tiles.refuses(here.device, kind)):
            why = "the products of a mixture's experts"
        elif not inside.enter_context(products_in_one_order(kind)):
            why = f"torch {torch.__version__} cannot keep products from being split"
        else:
            its = products(model.blocks)
            chosen = {} if multiplied else chosen_products(its, here.device, kind)
            inside.enter_context(in_order.products_by_kernel(chosen))
            why = differing(its, here.device, kind) or norms_differing(norms(model.blocks), here.device, kind)
            compute_logits(its, here.device, kind)
        stored = build_stored(here, held, dtype, in_order.product if why else multiply)
        inside.enter_context(as_stored.multiplied_so(stored))
        torch.cuda.empty_cache()  # of what was compared
        said = here.comm.allgather(why)
        rank, why = next(((rank, one) for rank, one in enumerate(said) if one), (0, ""))
        if why and config.pipeline.exact_bits:
            here.say(f"note: tokens of a row may depend on the rows beside it, by rounding (rank {rank}: {why})")
        yield {"exact_bits": f"no: {why}" if why else YES}


@contextlib.contextmanager
def products_in_one_order(dtype: torch.dtype) -> Iterator[bool]:
    """Inside, torch's products on CUDA are cuBLASLt's, never split along their inputs. Yields whether this torch can."""
    matmul: Any = torch.backends.cuda.matmul
    setting, library = REDUCTIONS[dtype], torch.backends.cuda.preferred_blas_library()
    before = getattr(matmul, setting), getattr(matmul, f"{setting}_split_k", None)
    try:
        if before[1] is not None:
            torch.backends.cuda.preferred_blas_library("cublaslt")
    except RuntimeError:  # built without it
        before = before[0], None
    if before[1] is None:
        yield False
        return
    setattr(matmul, setting, (False, False))
    try:
        yield True
    finally:
        setattr(matmul, setting, before)
        torch.backends.cuda.preferred_blas_library(library)


def products(blocks: Mapping[str, Block]) -> list[Product]:
    """The different products of layers and head, but those of experts and routers, in fp8 and in a dtype of their own."""
    found: dict[Product, None] = {}
    for name, block in blocks.items():
        names = {parameter.name for parameter in block.parameters}
        for parameter in block.parameters if name != "embed" else ():
            if parameter.own_dtype is not None or parameter.name == "router" or parameter.multiplied:
                continue
            for tensor, shape in parameter.computed.items():
                if len(shape) == 2:
                    most = LOGITS_ROWS if name == "head" else MANY
                    found[shape[0], shape[1], f"{tensor}_bias" in names, most] = None
    return list(found)


def differing(its: Iterable[Product], device: torch.device, dtype: torch.dtype, linear: Linear = multiply) -> str:
    """In words the first of these products whose rows have other bits with fewer rows beside them; empty if none has."""
    for product in its:
        outputs, inputs, has_bias, _ = product
        try:
            same = not differs(linear, tensors_of(product, device, dtype))
        except torch.OutOfMemoryError:
            return f"no memory to check the product of {outputs:,} x {inputs:,}"
        if not same:
            return f"the product of {outputs:,} x {inputs:,}{' with its bias' * has_bias} depends on the number of rows"
    return ""


def compute_logits(its: Iterable[Product], device: torch.device, dtype: torch.dtype, linear: Linear = multiply) -> None:
    """Computes those of the products that give logits for each number of rows that they get in a run: what computes them is
    loaded then, and not when the device is to do something else."""
    sizes = sorted({padded_rows(rows) for rows in range(1, LOGITS_ROWS + 1)})
    with contextlib.suppress(torch.OutOfMemoryError):
        for product in its:
            if product[-1] == LOGITS_ROWS:
                hidden, weight, bias = tensors_of(product, device, dtype)
                for size in sizes:
                    linear(hidden[:size], weight, bias)


def norms(blocks: Mapping[str, Block]) -> list[tuple[str, int]]:
    """The different norms of a model: of layers where they have a bias, else root mean squares; and their size."""
    found: dict[tuple[str, int], None] = {}
    for block in blocks.values():
        names = {parameter.name for parameter in block.parameters}
        for parameter in block.parameters:
            if "norm" in parameter.name and len(parameter.shape) == 1 and not parameter.name.endswith("_bias"):
                kind = "layer_norm" if f"{parameter.name}_bias" in names else "rms_norm"
                found[kind, parameter.shape[0]] = None
    return list(found)


def norms_differing(its: Iterable[tuple[str, int]], device: torch.device, dtype: torch.dtype) -> str:
    """In words the first of these norms whose rows have other bits with fewer rows beside them; empty if none has."""
    draw = torch.Generator(device).manual_seed(0)
    for name, size in its:
        weight, hidden = (
            torch.empty(shape, dtype=dtype, device=device).normal_(generator=draw) for shape in ((size,), (MANY, size))
        )
        given, function = ((size,), weight), getattr(F, name)
        whole = function(hidden, *given)
        if not all(torch.equal(function(hidden[:rows], *given), whole[:rows]) for rows in (FEW, SOME)):
            return f"torch's {name} of {size:,} depends on the number of rows"
    return ""
