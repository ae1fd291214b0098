"""What a key that is none of [sampling]'s means: the same setting by another program's name, a setting that Noria does not
have, a key misspelt, or a column of the user's own. One list for rows and for batch lines; knows no file and no model.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from noria.sampling import Sampling, as_integers, whole
from noria.tools.keys import checked, types_of

# The same setting under the names that vLLM, OpenAI and transformers give it: rows may use them.
SYNONYMS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "num_return_sequences": "n",
}
# What the chat template reads beside the messages of a row; vLLM's requests have them too.
BESIDE = ("tools", "documents", "continue_final_message", "add_generation_prompt")
# Names that people take for one of Noria's and that mean something else: the row is refused.
REFUSED = {
    "best_of": ("n", "it returns the best of more samples, and n returns all"),
    "max_length": ("max_new_tokens", "it counts the prompt's tokens too"),
    "eos_token_id": ("stop_token_ids", "it replaces the model's end tokens, and stop_token_ids adds to them"),
    "guided_json": ("structured_outputs", 'it is {"json": ...} there'),
    "guided_regex": ("structured_outputs", 'it is {"regex": ...} there'),
    "guided_choice": ("structured_outputs", 'it is {"choice": ...} there'),
    "guided_grammar": ("structured_outputs", 'it is {"grammar": ...} there'),
}
# Other names that other programs give to a setting of Noria's: the row is refused, with Noria's name.
ALIASES = {
    "max_output_tokens": "max_new_tokens",
    "max_gen_tokens": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "min_length": "min_new_tokens",
    "temp": "temperature",
    "nucleus": "top_p",
    "rep_penalty": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
    "random_seed": "seed",
    "num_samples": "n",
    "num_completions": "n",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_words": "stop",
    "ignore_eos_token": "ignore_eos",
    "thinking_budget": "thinking_token_budget",
    "max_thinking_tokens": "thinking_token_budget",
    "top_logprobs": "logprobs",
    "top_n_tokens": "logprobs",
}
# Keys by which other programs steer a generation and which Noria does not have, with the values that ask for nothing.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "assistant_early_exit": (),
    "audio": (),
    "bad_words_ids": (),
    "beam_width": (1,),
    "begin_suppress_tokens": (),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "diversity_penalty": (0,),
    "do_sample": (),
    "dola_layers": (),
    "dry_allowed_length": (),
    "dry_base": (),
    "dry_multiplier": (0,),
    "dry_penalty_last_n": (),
    "dry_sequence_breakers": (),
    "dynamic_temperature": (False,),
    "dynatemp_exponent": (),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "ebnf": (),
    "echo": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guidance_scale": (1,),
    "guided_decoding": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "lora_request": (),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_eta": (),
    "mirostat_mode": (0,),
    "mirostat_tau": (),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "penalty_range": (),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_lookup_num_tokens": (0,),
    "reasoning_effort": (),
    "remove_invalid_values": (False,),
    "repeat_last_n": (),
    "repetition_penalty_range": (),
    "return_full_text": (False,),
    "sequence_bias": (),
    "smoothing_factor": (0,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "stopping_criteria": (),
    "stream": (False,),
    "structural_tag": (),
    "suffix": ("",),
    "suppress_tokens": (),
    "system_prompt": ("",),
    "tfs": (1,),
    "tfs_z": (1,),
    "token_healing": (False,),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": (),
    "watermark": (False,),
    "watermarking_config": (),
    "web_search_options": (),
    "xtc_probability": (0,),
    "xtc_threshold": (),
}
# Words within the distance of a short key, which are columns of their own.
_WORDS = frozenset(
    "at atom bat bed can cap car cart cast cat cats chain char chars chart charts cheap chest coat cost crap crop cut"
    " dead deed end fat feat fed fee feed feeds feel fees flat has hat hot lead led loop mind mine mini minor mins"
    " mint minus mixup need needs op ops plat prop read red scope seal seat sec sect see seek seem seen sees self sell send"
    " sends sent sep set sets sex shed ship shop shops shot show skip slot slow snap snow soap son soon soup spec sped"
    " speed speeds spend spot stat stay stem step steps stock store storm story strip swap systems tap than that tip"
    " to toc tok took top topic tops topup tot toy used weed week what".split()
)
MAX_DISTANCE = 2
_SHORT = 6  # letters: keys of more are near no word of a language
# Keys that a name may be nearly: later ones are told from columns by their exact name alone.
NEAR = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "chat",
    "system",
    "logprobs",
    "prompt_logprobs",
)
_LIKE_NAMES = {name: name for name in NEAR} | {name: SYNONYMS[name] for name in ("max_tokens", "max_completion_tokens")}
_LONGEST = max(map(len, (*NEAR, *ALIASES, *REFUSED))) + MAX_DISTANCE


def is_foreign(name: str, value: Any) -> bool:
    """Whether this is another program's key that Noria does not have, with a value that asks for something."""
    return name in FOREIGN and asks(name, value)


def asks(name: str, value: Any) -> bool:
    """Whether the value of another program's key asks for anything: not where it is null, empty, or says `as usual`."""
    neutral = FOREIGN.get(name, (1,) if name == "best_of" else ())
    schema = name in ("guided_json", "json_schema")  # {} is any JSON
    if value is None or (isinstance(value, list | dict | str) and not value and not schema):
        return False
    return not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def two_names(keys: Mapping[str, Any]) -> str | None:
    """What is said if two names of one key have different values."""
    given: dict[str, tuple[str, object]] = {}
    for name, value in keys.items():
        other, its = given.setdefault(SYNONYMS.get(name, name), (name, value))
        if its != value:
            return f"{other} is {its!r:.40} and {name} is {value!r:.40}, two names of one key: give one of them"
    return None


def refusal(name: str, value: Any) -> str | None:
    """Why a row with this key, which is none of Sampling, is refused; None: it is a column."""
    if name in REFUSED:
        meant, why = REFUSED[name]
        if not asks(name, value) or not _could_be_refused(name, value):
            return None
        return f"{name!r} is not a key of Noria: {why}; did you mean {meant!r}? (if it is your own column, rename it)"
    near = misspelt(name, value)
    return f"unknown key {name!r}; did you mean {near!r}? (if it is your own column, rename it)" if near else None


def misspelt(name: str, value: Any) -> str | None:
    """The key of Sampling that `name`, which is none of them, was probably meant to be; None: it is the user's own.

    Always where it differs in capitals and marks alone (`topP`, `top-k`), and within edit distance 2 of a key of more
    than 6 letters (`max_tokns`, `temprature`). Within that distance of a shorter key, and where other programs call a key
    so (`stop_strings`), only if the key could have such a value: `top_l` is meant to be `top_k` if it holds a whole number,
    and is a column if it holds a text. Common words (`step`, `store`, `topic`) are never meant to be a key.
    """
    if len(name) > _LONGEST or name in FOREIGN:
        return None
    return next((key for key, always in _candidates(name) if always or _could_be(value, key)), None)


@lru_cache(maxsize=4096)
def _candidates(name: str) -> tuple[tuple[str, bool], ...]:
    """Keys that `name` may be meant to be, the nearest first, and whether that is so whatever its value is."""
    lowered = name.lower()
    folded = [key for key in NEAR if len(key) > 1 and _letters(key) == _letters(lowered)]
    if folded:
        return ((folded[0], True),)
    if lowered in _WORDS:
        return ()
    exact = lowered.replace("-", "_").replace(" ", "_")
    alias = ALIASES.get(exact) or SYNONYMS.get(exact) or REFUSED.get(exact, (None,))[0]
    near = sorted((edit_distance(lowered, key), key) for key in _LIKE_NAMES)
    # A key must share something with the name: for `n`, of one letter, every name of up to two letters would be as near.
    keys = [key for distance, key in near if distance <= min(MAX_DISTANCE, len(key) - 1)]
    found = [(_LIKE_NAMES[key], len(key) > _SHORT and key != alias) for key in keys]
    return ((alias, False), *found) if alias else tuple(found)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name))


def _could_be_refused(name: str, value: Any) -> bool:
    if name.startswith("guided_"):
        return value is not None
    if name != "eos_token_id":
        return _could_be(value, REFUSED[name][0])
    value = _json(value)
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(whole(one), int) and not isinstance(one, bool) for one in ids)


def _could_be(value: Any, key: str) -> bool:
    """Whether the key takes values of this type; a table's cell is text, whatever it says."""
    if value is None:
        return False
    kind = types_of(Sampling)[key]
    for one in (value, _json(value)):
        try:
            checked(as_integers(one, kind), kind, key)
            return True
        except ValueError:
            pass
    return False


def _json(value: Any) -> Any:
    try:
        return json.loads(value.lower()) if isinstance(value, str) and len(value) < 100 else value
    except (ValueError, RecursionError):
        return value


def edit_distance(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that turns `a` into `b` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
