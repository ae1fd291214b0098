"""How a family says which tensors of a Hugging Face checkpoint make a parameter. Knows no tensor and no file.

A parameter is its sources one after another along dim 0; of one with three dimensions the first two together are the
rows.
"""

from collections.abc import Iterable, Mapping


class Transposed(str):
    """The name of a matrix that is stored [in, out], or is wanted so: its transpose is the source."""

    __slots__ = ()


def of_layer(
    prefix: str, parameters: Iterable[str], modules: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The sources of a layer's parameters: `modules` maps a parameter to its modules below `prefix`.

    `<name>_bias` is made of the biases of the modules of `<name>`.
    """
    names = {}
    for parameter in parameters:
        ending = "bias" if parameter.endswith("_bias") else "weight"
        names[parameter] = tuple(f"{prefix}.{module}.{ending}" for module in modules[parameter.removesuffix("_bias")])
    return names
