"""What a model's own generation_config.json says of sampling: what is taken, and what cannot be. Knows no rows."""

from collections.abc import Mapping
from typing import Any

from noria.errors import InputError, require
from noria.sampling import Sampling

TAKEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Keys of transformers that change what is generated and that Noria does not take, with the values at which they do not.
# Lengths are the run's own and are not among them.
_NOT_TAKEN = {
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "num_beams": (1,),
    "diversity_penalty": (0,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ([], {}),
    "stop_strings": ([], ""),
    "watermarking_config": ({},),
    "token_healing": (False,),
    "dola_layers": (),
}


def taken(generation_config: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    """The keys that the run's `sampling` leaves open, as the model would have them: those that it says if it samples.

    A model samples where `do_sample` is true, then with a temperature of 1 if it says none. Raises InputError for a value
    that is none of its key's.
    """
    samples = generation_config.get("do_sample")
    require(samples in (None, True, False), _wrong(f"do_sample is {str(samples)[:40]!r}: it must be true or false"))
    if sampling.generation_config == "none" or samples is not True:
        return {}
    said = {name: generation_config[name] for name in TAKEN if generation_config.get(name) is not None}
    said = {"temperature": 1.0} | said
    open_now = {name: value for name, value in said.items() if getattr(sampling, name) is None}
    try:
        checked = Sampling().override(open_now)
    except InputError as error:
        raise InputError(_wrong(str(error))) from error
    return {name: getattr(checked, name) for name in open_now}


def told(generation_config: Mapping[str, Any], sampling: Sampling, found: Mapping[str, Any]) -> list[str]:
    """Lines for the user: what was taken, and what the model asks for and does not get."""
    if sampling.generation_config == "none":
        return []
    lines = []
    if found:
        lines.append(f"sampling by the model's generation_config.json: {_words(found)}")
    other = {name: generation_config[name] for name in _NOT_TAKEN if _asks(generation_config, name)}
    if generation_config.get("do_sample") is not True and generation_config.get("repetition_penalty") not in (None, 1):
        other["repetition_penalty"] = generation_config["repetition_penalty"]
    if other:
        lines.append(f"the model's generation_config.json asks for {_words(other)} too, which is not taken")
    return lines


def _asks(generation_config: Mapping[str, Any], name: str) -> bool:
    value = generation_config.get(name)
    return value is not None and value not in _NOT_TAKEN[name]


def _words(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {str(value)[:60]}" for name, value in keys.items())


def _wrong(reason: str) -> str:
    return (
        f"the model's generation_config.json: {reason}; give the key yourself, or take nothing from it with"
        " --generation-config none"
    )
