"""How a config.json says that weights are quantized, for random ones, which have no tensors that could say it."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from noria.checkpoint.published import KEYS, said_in
from noria.checkpoint.published._floats import MXFP4_GROUP, NVFP4_GROUP
from noria.checkpoint.published._groups import Scheme, of_modules, schemes
from noria.checkpoint.quantization import WORDS, Quantization
from noria.errors import InputError, require
from noria.models._config import shown

# Of the modules that each parameter is made of its form; None: plain numbers.
Chosen: TypeAlias = Callable[[Sequence[Sequence[str]]], Sequence[Quantization | None]]
LEFT = ("modules_to_not_convert", "ignored_layers", "exclude_modules", "ignore")  # lists of modules that stay plain
BLOCK = 128  # outputs and inputs that share a scale in ModelOpt's FP8_PB_WO


def said_by(config: Mapping[str, Any], experts: bool = False) -> Chosen | None:
    """The encodings that a config.json asks for, by modules; None: plain numbers. experts: whether the model has any.

    Beside the methods of published models, `quant_method` may be int4, int8, fp8_channel, mxfp4 or nvfp4, with
    `group_size`. Raises InputError for what Noria has no encoding for.
    """
    found = [*said_in(config).items()]
    if not found:
        return None
    key, settings = found[0]
    require(
        isinstance(settings, dict), f"config.json: {key} is {shown(settings)}: it must be an object with quant_method"
    )
    try:
        return _chosen(str(settings.get("quant_method", KEYS[key])), settings, experts)
    except (InputError, KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(
            f"config.json: random weights cannot be made as {key} says ({str(error)[:120]}): take it out for plain ones, or"
            ' give one such as {"quant_method": "int4", "group_size": 64}'
        ) from error


def _chosen(method: str, settings: Mapping[str, Any], experts: bool) -> Chosen:
    if method == "compressed-tensors":
        return _compressed(settings)
    if method.startswith("modelopt"):
        return _modelopt(settings.get("quantization", settings))
    its, left = _quantization(method, settings), _left(settings)
    of_experts = Quantization("mxfp4", {}) if settings.get("expert_dtype") == "fp4" else its
    of_others = None if method == "mxfp4" and experts else its  # as it is published, of experts alone

    def choose(modules: Sequence[str]) -> Quantization | None:
        if any(_is_named(one, left) for one in modules):
            return None
        return of_experts if all("experts" in one.split(".") for one in modules) else of_others

    return _one_by_one(choose)


def _one_by_one(choose: Callable[[Sequence[str]], Quantization | None]) -> Chosen:
    return lambda parameters: [choose(modules) for modules in parameters]


def _quantization(method: str, settings: Mapping[str, Any]) -> Quantization:
    if method in ("fp8", "fbgemm_fp8"):
        return _fp8(settings.get("weight_block_size"), settings.get("scale_fmt") == "ue8m0")
    if method in ("mxfp4", "nvfp4"):
        return Quantization(method, {})
    if method in WORDS:
        return Quantization(WORDS[method], _given(settings, "group_size"))
    if method in ("gptq", "awq"):
        for key in ("dynamic", "modules_in_block_to_quantize"):
            require(not settings.get(key), f"{key} is {shown(settings.get(key))}: it makes modules differ")
        its = {"symmetric": bool(settings.get("sym", not settings.get("zero_point", method == "awq")))}
        return _integers(settings["bits"], settings["group_size"], its | {"permuted": bool(settings.get("desc_act"))})
    raise InputError(f"quant_method is {shown(method)}")


def _left(settings: Mapping[str, Any]) -> list[str]:
    """The names of modules, with `*` for whatever, that stay plain."""
    found = [one for key in LEFT for one in settings.get(key) or ()]
    require(all(isinstance(one, str) for one in found), f"{', '.join(LEFT)} are lists of names")
    return [one.replace("language_model.", "") for one in found]


def _is_named(module: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is the module's name, or some whole words of it that follow one another."""
    return any(fnmatchcase(f".{module}.", f"*.{one}.*") for one in patterns)


def _given(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _fp8(block: Any, powers: bool) -> Quantization:
    scales = {"scale_dtype": "e8m0" if powers else "float32"}
    return Quantization("fp8_block", scales | {"block_size": block}) if block else Quantization("fp8_channel", scales)


def _integers(bits: Any, group_size: Any, settings: Mapping[str, Any]) -> Quantization:
    require(bits in (4, 8), f"{shown(bits)} bits")
    return Quantization(f"int{bits}", {"group_size": group_size, **settings})


def _compressed(settings: Mapping[str, Any]) -> Chosen:
    """Each module as its group says."""
    found = schemes(settings)
    require(found, "config_groups has no group that quantizes weights")
    made, ignored = {one: _of_scheme(one) for one in found}, settings.get("ignore")

    def choose(parameters: Sequence[Sequence[str]]) -> list[Quantization | None]:
        groups = of_modules(found, ignored, [one for modules in parameters for one in modules])
        each = [{groups[one] for one in modules} for modules in parameters]
        alike = [next(iter(its)) if len(its) == 1 else None for its in each]
        return [None if scheme is None else made[scheme] for scheme in alike]

    return choose


def _of_scheme(scheme: Scheme) -> Quantization:
    if scheme.kind == "float" and scheme.bits == 8 and scheme.group_size is None:
        return _fp8(list(scheme.block) if scheme.block else None, powers=False)
    if scheme.kind == "float" and scheme.bits == 4 and scheme.group_size == NVFP4_GROUP:
        return Quantization("nvfp4", {"tensor_scale": "divides"})
    if scheme.kind == "float" and scheme.bits == 4 and scheme.group_size == MXFP4_GROUP:
        return Quantization("mxfp4", {})
    require(scheme.kind == "int", f"{scheme.name}: {scheme.words}")
    return _integers(scheme.bits, scheme.group_size or -1, {"symmetric": scheme.symmetric, "permuted": scheme.ordered})


def _modelopt(settings: Mapping[str, Any]) -> Chosen:
    """All modules but those that are excluded; of mixed ones those that are listed, each in its own way."""
    algorithm, left = settings["quant_algo"], _left(settings)
    if algorithm != "MIXED_PRECISION":
        its = _of_algorithm(algorithm)
        return _one_by_one(lambda modules: None if any(_is_named(one, left) for one in modules) else its)
    layers = {name: _of_algorithm(one["quant_algo"]) for name, one in settings["quantized_layers"].items()}

    def choose(modules: Sequence[str]) -> Quantization | None:
        found = [layers.get(one) for one in modules]
        return found[0] if all(one == found[0] for one in found) else None

    return _one_by_one(choose)


def _of_algorithm(algorithm: Any) -> Quantization:
    if algorithm in ("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"):
        return Quantization("nvfp4", {})
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        return _fp8(None, powers=False)
    require(algorithm == "FP8_PB_WO", f"quant_algo is {shown(algorithm)}")
    return _fp8([BLOCK, BLOCK], powers=False)
