"""How a config.json says that weights are quantized, for random ones, which have no tensors that could say it."""

from collections.abc import Mapping
from typing import Any

from noria.checkpoint.published import KEYS, said_in
from noria.checkpoint.quantization import WORDS, Quantization
from noria.errors import InputError, require
from noria.models._config import shown

WITHOUT_SETTINGS = ("mxfp4", "nvfp4")


def said_by(config: Mapping[str, Any]) -> Quantization | None:
    """The encoding that a config.json asks for; None: plain numbers.

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
        return _quantization(str(settings.get("quant_method", KEYS[key])), settings)
    except (InputError, KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(
            f"config.json: random weights cannot be made as {key} says ({str(error)[:120]}): take it out for plain ones, or"
            ' give one such as {"quant_method": "int4", "group_size": 64}'
        ) from error


def _quantization(method: str, settings: Mapping[str, Any]) -> Quantization:
    if method in ("fp8", "fbgemm_fp8"):
        return _fp8(settings.get("weight_block_size"), settings.get("scale_fmt") == "ue8m0")
    if method in WITHOUT_SETTINGS:
        return Quantization(method, {})
    if method in WORDS:
        return Quantization(WORDS[method], _given(settings, "group_size"))
    if method in ("gptq", "awq"):
        its = {"symmetric": bool(settings.get("sym", not settings.get("zero_point", method == "awq")))}
        return _integers(settings["bits"], settings["group_size"], its | {"permuted": bool(settings.get("desc_act"))})
    if method == "compressed-tensors":
        return _compressed(settings)
    raise InputError(f"quant_method is {shown(method)}")


def _given(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _fp8(block: Any, powers: bool) -> Quantization:
    scales = {"scale_dtype": "e8m0" if powers else "float32"}
    return Quantization("fp8_block", scales | {"block_size": block}) if block else Quantization("fp8_channel", scales)


def _integers(bits: Any, group_size: Any, settings: Mapping[str, Any]) -> Quantization:
    require(bits in (4, 8), f"{shown(bits)} bits")
    return Quantization(f"int{bits}", {"group_size": group_size, **settings})


def _compressed(settings: Mapping[str, Any]) -> Quantization:
    """The first of the groups of modules."""
    if settings.get("format") == "nvfp4-pack-quantized":
        return Quantization("nvfp4", {"tensor_scale": "divides"})
    its = next(iter(settings["config_groups"].values()))["weights"]
    if its["type"] == "float" and its["num_bits"] == 8:
        return _fp8(its.get("block_structure"), powers=False)
    require(its["type"] == "int", f"type is {shown(its['type'])}, num_bits {shown(its['num_bits'])}")
    ordered = {
        "symmetric": bool(its.get("symmetric", True)),
        "permuted": its.get("actorder") in ("group", "weight", True),
    }
    return _integers(its["num_bits"], its.get("group_size") or -1, ordered)
