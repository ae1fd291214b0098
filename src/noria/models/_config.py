"""Reads single values of a config.json; every refusal names the key, the value and what would do.

Knows no family and no tensors.
"""

from collections.abc import Mapping

from noria.config import InputError, require


def integer(config: Mapping, key: str, default: int | None = None) -> int:
    """A whole number of at least 1; a missing or null key is the default. Raises InputError."""
    value = default if config.get(key) is None else config[key]
    require(value is not None, f"config.json: {key} is missing")
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(whole, f"config.json: {key} is {value!r}: it must be a whole number of at least 1")
    return value


def number(config: Mapping, key: str, default: float | None = None) -> float:
    """A number above 0; a missing or null key is the default. Raises InputError."""
    value = default if config.get(key) is None else config[key]
    require(value is not None, f"config.json: {key} is missing")
    positive = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    require(positive, f"config.json: {key} is {value!r}: it must be a number above 0")
    return float(value)


def flag(config: Mapping, key: str, default: bool) -> bool:
    """True or false; a missing or null key is the default. Raises InputError."""
    value = default if config.get(key) is None else config[key]
    require(isinstance(value, bool), f"config.json: {key} is {value!r}: it must be true or false")
    return value


def only(config: Mapping, key: str, value: object, reason: str) -> None:
    """Raises InputError, with the reason, unless the key has this one value or is missing or null."""
    found = config.get(key)
    if found is not None and found != value:
        raise InputError(f"config.json: {key} is {found!r}: {reason}")


def refuse_quantized(config: Mapping) -> None:
    """Raises InputError for weights that are stored in another form than numbers of the model's dtype."""
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        raise InputError(
            f"config.json: quantization_config ({method}) is not in this version of Noria: take the unquantized model"
        )
