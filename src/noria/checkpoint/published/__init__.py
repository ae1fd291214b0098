"""Models that others published in few bits: which fields of Noria's encodings their tensors are. A format a file.

A file has

    METHODS     the values of `quant_method` that it reads
    FORMAT      a class, made of (settings, tensors): what the model's config.json says, and the directory's Tensors

and the class

    matrix(module, number) -> Published | None      how a module's matrix is stored; None: as plain numbers, or not at all;
                                            `number`: of a tensor of many matrices, this one
    words                                   what it is: `fp8 in blocks of 128 x 128`
    activations, cache                      how it rounds activations and the cache, in a word; empty: it does not
    ASIDE                                   how the names of tensors end that serve that

Both raise InputError, naming key or tensor, for what they do not understand and for a directory that lies about itself. A
format knows names, dtypes and shapes of tensors; it reads no numbers before `Published.fields` is called. Rounding of
activations is left out: Noria computes with more precision than the format asks for.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from noria import kinds, models
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.published._tensors import Published, Tensors
from noria.checkpoint.tensor_files import Tensor
from noria.errors import InputError, require
from noria.models._config import shown
from noria.tools.text import plural

PACKAGE = "checkpoint.published"
# The keys of config.json that say that weights are quantized, and by whom where the value does not say it.
KEYS = {"quantization_config": "", "compression_config": "compressed-tensors", "quantization": "MLX"}
MODELOPT = "hf_quant_config.json"  # where ModelOpt says it
# What is not read, by its quant_method: what it is.
REFUSED = {
    "bitsandbytes": "codes of bitsandbytes, which its own kernels alone decode",
    "gguf": "GGUF, llama.cpp's format",
    "mxfp8": "MXFP8",
    "MLX": "MLX's format",
}


class Form(Protocol):
    """What a format's class has."""

    ASIDE: tuple[str, ...]
    words: str
    activations: str
    cache: str

    def matrix(self, module: str, number: int | None = None) -> Published | None: ...


def form_of(directory: Directory, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Form | None:
    """The form of a directory's weights; None: plain numbers. Raises InputError for one that is not read."""
    method, settings, where = _said(directory, config)
    if not method:
        return None
    kind = _kind(method)
    if kind is not None:
        try:
            form: Form = kind.FORMAT(settings, Tensors(tensors))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return form
    known = ", ".join(method for name in kinds.names(PACKAGE) for method in kinds.load(PACKAGE, name).METHODS)
    what = f" ({REFUSED[method]})" if method in REFUSED else ""
    raise InputError(
        f"{where}: weights quantized by {shown(method)}{what} are not read by this version of Noria: take the unquantized"
        f" model, or one of {known}"
    )


def _kind(method: str) -> Any:
    """The file that reads a method; None: none does."""
    loaded = (kinds.load(PACKAGE, name) for name in kinds.names(PACKAGE))
    return next((kind for kind in loaded if method in kind.METHODS), None)


def said_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json, or that of the text model within it, says of quantized weights, by its keys."""
    text = models.text_of(config)
    said = {key: text.get(key) if config.get(key) is None else config[key] for key in KEYS}
    return {key: settings for key, settings in said.items() if settings is not None}


def _said(directory: Directory, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str]:
    """The method, its settings, and which file says so; no method: the weights are plain.

    Raises InputError where two places name methods that different files read.
    """
    found: list[tuple[str, Mapping[str, Any], str]] = []
    for key, settings in said_in(config).items():
        require(
            isinstance(settings, dict),
            f"{directory.path}: config.json: {key} is {shown(settings)}: it must be an object with quant_method",
        )
        found.append((str(settings.get("quant_method") or KEYS[key])[:80], settings, f"config.json: {key}"))
    own = directory.json(MODELOPT)
    if own:
        found.append(("modelopt", own[1], MODELOPT))
    if not found:
        return "", {}, ""
    named = [one for one in found if one[0]] or found
    method, settings, where = named[0]
    for other, _, place in named[1:]:
        require(
            _kind(other) is _kind(method),
            f"{directory.path}: {where} names {shown(method)}, {place} names {shown(other)}: the weights are of one"
            " format, remove what does not belong to them, or download the directory again",
        )
    return method or "unknown", settings, f"{directory.path}: {where}"


def notes(form: Form, left: Collection[str]) -> list[str]:
    """A line each on the rounding of activations and of the cache, if the form has it; `left`: tensors that serve it."""
    its = f"; {plural(len(left), 'tensor')} of it left out" if left else ""
    said = []
    if form.activations or left:
        said.append(
            f"{form.words}: it rounds activations too ({form.activations or 'by scales'}), Noria does not: only weights are"
            f" stored so, and products are the more precise ones{its}"
        )
    if form.cache:
        said.append(f"the cache's scheme ({form.cache}) is not used: keys and values are of the run's dtype")
    return said
