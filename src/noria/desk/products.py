"""Products in fp8, where a user asks for them: which weights they take, and where they are refused.

Experts are decoded, as without it: their kernels multiply numbers of the run's dtype.
"""

from collections.abc import Iterator
from dataclasses import replace

from noria.blocks import Block, lay_out
from noria.config import Config
from noria.errors import require
from noria.model import OpenModel, in_products

FP8 = ("fp8_block", "fp8_channel")


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
    blocks = {name: _marked(block) for name, block in opened.blocks.items()}
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


def _marked(block: Block) -> Block:
    names = {one.name for one in in_products(block) if one.encoding in FP8}
    if not names:
        return block
    held = {one.name: replace(its, multiplied=one.name in names) for one in block.parameters if (its := one.encoded)}
    dtype = next(one.dtype for one in block.parameters if one.own_dtype is None)
    return lay_out(block.name, {one.name: one.wanted for one in block.parameters}, dtype, held)
