"""Reads single values of a config.json; every refusal names the key, the value and what would do.

A config.json is not trusted: sizes are bounded here, before anything is counted or allocated by them. Knows no family
and no tensors.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from noria.errors import InputError, require

MAX_SIZE = 2**31 - 1  # of any size: token ids and kernels count in 32 bits
MAX_LAYERS = 10_000  # a layer's name has four digits
MAX_SHOWN = 80  # characters of a value in a message


def shown(value: object) -> str:
    """The value as a message shows it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


class UnknownKeys(InputError):
    """A config.json has keys that nobody knows: `keys`, in its order, at its top or `inside` objects of these names. `words`
    name them, with the first one's value."""

    def __init__(self, keys: list[str], value: object, inside: tuple[str, ...] = ()):
        others = f" (and {shown(', '.join(keys[1:]))[1:-1]})" if keys[1:] else ""
        place = f" of {inside[0]}" if inside else ""
        self.keys, self.inside = keys, inside
        self.words = f"config.json: {shown(keys[0])[1:-1]}{place} is {shown(value)}{others}"
        super().__init__(
            f"{self.words}: Noria does not know what it asks for in this family, a later version may; remove it if the"
            " model's numbers do not depend on it"
        )

    def left_out(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config without them."""
        if not self.inside:
            return {key: value for key, value in config.items() if key not in self.keys}
        return {key: _without(value, self.keys) if key in self.inside else value for key, value in config.items()}


def _without(value: Any, keys: list[str]) -> Any:
    """An object without these keys, nor those inside it."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without(one, keys) for key, one in value.items() if key not in keys}


# What says nothing of the numbers that a model computes: how it is found, made, trained, sampled and shown.
WITHOUT_EFFECT = frozenset(
    "architectures auto_map model_type torch_dtype dtype transformers_version _name_or_path name_or_path use_cache"
    " bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id initializer_range attention_dropout"
    " hidden_dropout resid_pdrop embd_pdrop output_router_logits router_aux_loss_coef output_attentions"
    " output_hidden_states return_dict id2label label2id problem_type finetuning_task task_specific_params pretraining_tp"
    " tokenizer_class prefix _attn_implementation _attn_implementation_autoset _commit_hash unsloth_version unsloth_fixed"
    " quantization_config compression_config quantization"  # checkpoint/published/ reads them
    " use_return_dict is_decoder tf_legacy_loss pruned_heads chunk_size_feed_forward max_length min_length do_sample"
    " temperature top_k top_p num_return_sequences"
    # what transformers 4 writes of every model
    " bad_words_ids begin_suppress_tokens cross_attention_hidden_size diversity_penalty early_stopping"
    " encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty"
    " no_repeat_ngram_size num_beam_groups num_beams output_scores remove_invalid_values repetition_penalty"
    " return_dict_in_generate suppress_tokens tie_encoder_decoder torchscript typical_p use_bfloat16"
    " gradient_checkpointing neftune_noise_alpha transformers.js_config".split()
)
# Of windows, which Qwen's families read, and Llama's, Mistral's and Phi-3's do not.
OF_WINDOWS = ("use_sliding_window", "max_window_layers", "layer_types")
OFF = frozenset(("add_cross_attention", "is_encoder_decoder"))  # which no decoder asks for


class Keys(Mapping[str, Any]):
    """A config.json that knows which of its keys were read, so that none is passed over in silence."""

    def __init__(self, config: Mapping[str, Any]):
        self._config, self._read = config, set[str]()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def having(self, **values: object) -> "Keys":
        """The same with other values of these keys; what is read of either counts for both."""
        made = Keys({**self._config, **values})
        made._read = self._read
        return made

    def refuse_others(self, *without_effect: str) -> None:
        """Raises UnknownKeys for keys that nobody read and that are not known to be without effect here.

        What begins with `_` is a note of whoever wrote the file, what ends with `_token_id` is the tokenizer's: neither says how
        anything is computed.
        """
        known = self._read | WITHOUT_EFFECT | {*without_effect}
        given = {key: value for key, value in self._config.items() if key not in known and value is not None}
        asking = (key for key in given if not (key.startswith("_") or key.endswith("_token_id")))
        others = [key for key in asking if key not in OFF or given[key] is not False]
        if others:
            raise UnknownKeys(others, self._config[others[0]])


def keys_of(config: Mapping[str, Any], defaults: Mapping[str, Any], synonyms: Mapping[str, str] | None = None) -> Keys:
    """The keys of a config.json, under a family's own names of them, and what those mean that it leaves out."""
    given = dict(config)
    for other, key in (synonyms or {}).items():
        if other in given and given.get(key) in (None, given[other]):
            given[key] = given.pop(other)
    return Keys({**defaults, **given})


def layers_of(config: Mapping[str, Any], key: str, count: int, known: tuple[str, ...]) -> list[str] | None:
    """A word for each of `count` layers, of the known ones; None where the key is missing. Raises InputError."""
    found = config.get(key)
    right = isinstance(found, list) and len(found) == count and all(word in known for word in found)
    require(
        found is None or right,
        f"config.json: {key} is {shown(found)}: it must be a list of {count} of {', '.join(known)}",
    )
    return found


def objects_alone(config: Mapping[str, Any], name: str) -> None:
    """Raises InputError for a value beside objects of kinds of layers: nobody would read it. name: of what holds them."""
    for key, its in config.items():
        words = f"config.json: {shown(key)[1:-1]} of {name} is {shown(its)}: no object of a kind of layers"
        require(isinstance(its, Mapping | None), f"{words}, each of which must say it")


def integer(config: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
    """A whole number of 1 to `most`; a missing or null key is the default. Raises InputError."""
    value: Any = default if config.get(key) is None else config[key]
    if value is None:
        raise InputError(f"config.json: {key} is missing")
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(whole, f"config.json: {key} is {shown(value)}: it must be a whole number of at least 1")
    require(value <= most, f"config.json: {key} is {shown(value)}: it must be at most {most}")
    return value


def whole(config: Mapping[str, Any], key: str, default: int) -> int:
    """As `integer`, but 0 is a number too."""
    value = default if config.get(key) is None else config[key]
    return 0 if value == 0 and value is not False else integer(config, key, default)


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0; a missing or null key is the default. Raises InputError."""
    value: Any = default if config.get(key) is None else config[key]
    if value is None:
        raise InputError(f"config.json: {key} is missing")
    positive = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300
    require(positive, f"config.json: {key} is {shown(value)}: it must be a number above 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; a missing or null key is the default. Raises InputError."""
    value: Any = default if config.get(key) is None else config[key]
    require(isinstance(value, bool), f"config.json: {key} is {shown(value)}: it must be true or false")
    return value


def one_of(config: Mapping[str, Any], key: str, default: str, known: tuple[str, ...]) -> str:
    """One of the known words; a missing or null key is the default. Raises InputError."""
    value = default if config.get(key) is None else config[key]
    right = isinstance(value, str) and value in known
    require(right, f"config.json: {key} is {shown(value)}: not in this version of Noria; known: {', '.join(known)}")
    return value


def only(config: Mapping[str, Any], key: str, value: object, reason: str) -> None:
    """Raises InputError, with the reason, unless the key has this one value or is missing or null."""
    found = config.get(key)
    if found is not None and found != value:
        raise InputError(f"config.json: {key} is {shown(found)}: {reason}")


def fixed(config: Mapping[str, Any], values: Mapping[str, object]) -> None:
    """Raises InputError for a key with another value than the one with which its family is computed here."""
    for key, value in values.items():
        only(config, key, value, f"Noria computes this family only with {value!r}")


def multiple(one: tuple[str, int], other: tuple[str, int]) -> None:
    """Raises InputError unless the first (name, number) is a multiple of the second."""
    (name, number), (divisor_name, divisor) = one, other
    if number % divisor:
        raise InputError(f"config.json: {name} ({number}) is not a multiple of {divisor_name} ({divisor})")
