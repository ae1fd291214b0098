"""How a family says which tensors of a Hugging Face checkpoint make a parameter. Knows no tensor and no file.

A parameter is its sources one after another along dim 0; of one with three dimensions the first two together are the
rows.
"""

from collections.abc import Iterable, Mapping

# Of text models in models around them: what a name begins with, and with what where it is found (see `find` of a checkpoint).
IN_WRAPPERS = (
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("lm_head.", "language_model.lm_head."),
)


class Transposed(str):
    """The name of a matrix that is stored [in, out], or is wanted so: its transpose is the source."""

    __slots__ = ()


class Itself(str):
    """The name of a tensor, among those of modules whose weight or bias is meant."""

    __slots__ = ()


class Slice(str):
    """The name of a tensor of three dimensions of which one matrix, or its transpose, is the source.

    The other of both is it where all slices of a parameter make it so alone.
    """

    number: int
    turned: bool

    def __new__(cls, name: str, number: int, turned: bool = False) -> "Slice":
        made = super().__new__(cls, name)
        made.number, made.turned = number, turned
        return made


def turned(source: str) -> bool:
    """Whether the transpose of a source's tensor, or of its slice, is meant."""
    return source.turned if isinstance(source, Slice) else isinstance(source, Transposed)


def of_layer(
    prefix: str, parameters: Iterable[str], modules: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The sources of a layer's parameters: `modules` maps a parameter to its modules below `prefix`.

    `<name>_bias` is made of the biases of the modules of `<name>`, if it has no modules or tensors of its own.
    """
    names = {}
    for parameter in parameters:
        is_bias = parameter.endswith("_bias") and parameter not in modules
        ending = ".bias" if is_bias else ".weight"
        found = modules[parameter.removesuffix("_bias") if is_bias else parameter]
        names[parameter] = tuple(f"{prefix}.{one}{'' if isinstance(one, Itself) else ending}" for one in found)
    return names
