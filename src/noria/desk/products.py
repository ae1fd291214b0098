"""Products in fp8, where a user asks for them: which weights they take, and where they are refused.

Experts are decoded, as without it: their kernels multiply numbers of the run's dtype.
"""

from collections.abc import Iterator
from dataclasses import replace

from noria.blocks import Block, Parameter, lay_out
from noria.config import Config
from noria.errors import require
from noria.model import ModelShape, OpenModel

FP8 = ("fp8_block", "fp8_channel")
NOT_PRODUCTS = ("router", "correction")  # computed in other ways, as numbers


def check_products(config: Config, device: str, dtype: str) -> None:
    """Raises InputError where a run in this dtype on this kind of device cannot round activations. GPUs are tried later."""
    if config.products == "auto":
        return
    right = ("float32", "float64") if device == "cpu" else ("bfloat16", "float16")
    name = "a CPU" if device == "cpu" else "a GPU"
    require(
        dtype in right,
        f"products is {config.products}: {name} computes them in runs in {' or '.join(right)}, this one's dtype is {dtype}:"
        f' set dtype = "{right[0]}", or products = "auto"',
    )


def with_products(opened: OpenModel, products: str) -> dict[str, Block]:
    """The model's blocks with the weights marked that are multiplied as they are stored. Raises InputError for none."""
    if products == "auto":
        return opened.blocks
    blocks = {name: _marked(block, opened.shape) for name, block in opened.blocks.items()}
    marked = any(one.multiplied for block in blocks.values() for one in block.fielded)
    forms = sorted({one.encoding for block in blocks.values() for one in block.fielded})
    experts = any(one.pieces > 1 and one.encoding in FP8 for block in blocks.values() for one in block.fielded)
    which = (
        "only its experts are, which are decoded" if experts else f"it has {', '.join(forms) or 'plain numbers alone'}"
    )
    require(
        marked,
        f"products is {products}: no matrix of {opened.path}'s layers is stored in fp8 ({which}): convert the model in full"
        ' precision with --quantization fp8, or set products = "auto"',
    )
    return blocks


def told(config: Config) -> Iterator[str]:
    """What the log says of it."""
    if config.products != "auto":
        yield (
            "note: products in fp8: weights that are stored in fp8 are multiplied as they are, with each token's activations"
            " rounded to fp8 (experts are decoded): tokens are others than without --products fp8"
        )


def _marked(block: Block, shape: ModelShape) -> Block:
    names = {one.name for one in block.parameters if _is_product(block, one, shape)}
    if not names:
        return block
    held = {one.name: replace(its, multiplied=one.name in names) for one in block.parameters if (its := one.encoded)}
    dtype = next(one.dtype for one in block.parameters if one.own_dtype is None)
    return lay_out(block.name, {one.name: one.wanted for one in block.parameters}, dtype, held)


def _is_product(block: Block, parameter: Parameter, shape: ModelShape) -> bool:
    """Whether a family takes a parameter in products of hidden states alone; `up` of latents is absorbed by queries too."""
    absorbed = parameter.name == "up" and "latent" in shape.details
    right = parameter.encoding in FP8 and parameter.pieces == 1 and len(parameter.shape) == 2
    return block.name.startswith("layers/") and right and not absorbed and parameter.name not in NOT_PRODUCTS
