"""How a row is sampled: the keys of the section [sampling], nearly all of which a row of the prompts may have too.

Knows no model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, get_args

from noria.errors import require
from noria.structured import check_structured
from noria.template_kwargs import check_template_kwargs
from noria.tools.keys import checked, key, types_of

# By which rules rows are rendered, drawn and decoded. An output says by which it was begun, and goes on by them.
RULES = 2
# Of outputs that say nothing: a row's own seed draws by its number in the file, nothing comes from the model's
# generation_config.json, OpenAI's batch lines are sampled as other rows, a text is that of the new tokens alone.
OLD_RULES = 1


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled. Every key but those of RUN_KEYS may stand in a row of the prompts, where it overrides the run's.

    None for a key of OPEN: nobody has said it yet. `override` leaves none open.
    """

    max_new_tokens: int | None = key(
        "maximum length of a generation: tokens to generate, per row; 0 only scores the prompt (default: 256;"
        " for OpenAI batch lines what the context leaves)"
    )
    min_new_tokens: int = key("minimum number of tokens to generate: nothing ends the row before", 0)
    generation_config: str = key(
        "auto takes temperature, top_k, top_p, min_p and repetition_penalty from the model's generation_config.json if its"
        " do_sample is true and neither row nor run sets them; none takes nothing from it",
        "auto",
        ("auto", "none"),
    )
    temperature: float | None = key(
        "0 takes the most likely token; above 0 logits are divided by it before sampling (default: the model's, else 0; for"
        " OpenAI batch lines 1)"
    )
    top_k: int | None = key("sample from the k most likely tokens; 0: from all (default: the model's, else 0)")
    top_p: float | None = key(
        "sample from the most likely tokens that together have this probability (default: the model's, else 1)"
    )
    min_p: float | None = key(
        "sample from the tokens whose probability is at least min_p times that of the most likely one (default: the model's,"
        " else 0)"
    )
    repetition_penalty: float | None = key(
        "above 1 makes tokens of the prompt and of the text so far less likely (default: the model's, else 1)"
    )
    presence_penalty: float = key("subtracted from the logits of tokens that were already generated", 0.0)
    frequency_penalty: float = key("subtracted from a token's logit once for each time it was already generated", 0.0)
    logit_bias: dict[str, Any] | None = key("numbers to add to the logits of token ids, such as 50=-100,7=2.5")
    seed: int | None = key(
        "seed of the random numbers: with the run's seed each row draws its own, by its row number; a row with its own seed"
        " gives the same tokens at any place (default: 0)"
    )
    n: int = key("number of samples of each prompt; each is a row of the output", 1)
    stop: str | list[str] | None = key(
        "text that ends a row and is cut from it; in a run file it may be a list", text=True
    )
    stop_token_ids: list[int] | None = key("token ids that end a row, in addition to the model's own, such as 5,6")
    include_stop_str_in_output: bool = key("keep the text or token that ended a row at the end of its text", False)
    skip_special_tokens: bool = key("leave special tokens out of the text", True)
    bad_words: str | list[str] | None = key(
        "text that is never generated, with or without a space before it; in a run file it may be a list",
        text=True,
    )
    allowed_token_ids: list[int] | None = key("the only token ids that may be generated, such as 5,6")
    truncate_prompt_tokens: int | None = key(
        "keep only this many tokens of a prompt, its last ones; -1: as many as the context leaves beside max_new_tokens"
    )
    ignore_eos: bool = key("do not end a row at the model's end token", False)
    chat: bool = key("wrap each prompt as a user's message in the model's chat template", False)
    system: str | None = key("with chat: a system message before the user's message", text=True)
    chat_template_kwargs: dict[str, Any] | None = key(
        'variables of the chat template, a JSON object such as {"enable_thinking": false}',
        json=True,
    )
    logprobs: int | None = key(
        "store the log-probability of each token and of the k most likely tokens at its place (0: of the token only)"
    )
    prompt_logprobs: bool = key("store the log-probability of each token of the prompt too", False)
    structured_outputs: dict[str, Any] | None = key(
        "what the text must be: a JSON object with one of json (a JSON schema), regex, choice (a list of texts), grammar (Lark"
        ' or GBNF) and json_object (true), such as {"choice": ["yes", "no"]}; needs llguidance',
        json=True,
    )
    json_schema: str | None = key("file of a JSON schema that every text must fit; needs llguidance")
    regex: str | None = key("regular expression that every text must match; needs llguidance", text=True)
    choice: str | list[str] | None = key(
        "texts of which every text must be one, such as yes,no; in a run file it may be a list; needs llguidance",
        text=True,
    )
    reasoning_markers: str | list[str] | None = key(
        "texts between which the model thinks, such as '<think>,</think>': what stands there is kept apart, in the column"
        " reasoning; none keeps it in the text (default: the model's; by its chat template)",
        text=True,
    )
    thinking_token_budget: int | None = key(
        "maximum number of tokens of a row's thinking: after them it is closed with the model's own marker"
    )

    def __post_init__(self) -> None:
        for name, (least, most) in _SAMPLING_RANGES.items():
            value = getattr(self, name)
            bounds = f"in {least:g} .. {most:g}" if most < float("inf") else f"{least:g} or more"
            inside = value is None or (least <= value <= most and value != float("inf"))
            require(inside, f"sampling.{name} is {value}: it must be {'finite' if value == float('inf') else bounds}")
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"sampling.top_p is {self.top_p}: it must be above 0 and at most 1",
        )
        penalty, top_k = self.repetition_penalty, self.top_k
        right = penalty is None or 0 < penalty < float("inf")
        require(right, f"sampling.repetition_penalty is {penalty}: it must be above 0")
        require(
            top_k is None or 0 <= top_k < 2**31,
            f"sampling.top_k is {self.top_k}: it must be in 0 (all tokens) .. 2^31-1",
        )
        require(self.seed is None or 0 <= self.seed < 2**63, f"sampling.seed is {self.seed}: it must be in 0 .. 2^63-1")
        _check_texts("stop", self.stop_texts, MAX_STOPS)
        _check_texts("bad_words", self.bad_texts, MAX_BAD_WORDS)
        _check_token_ids("allowed_token_ids", self.allowed_token_ids or [])
        require(self.allowed_token_ids != [], "sampling.allowed_token_ids is empty: nothing could be generated")
        kept = self.truncate_prompt_tokens
        right = kept is None or kept == -1 or kept >= 1
        require(
            right, f"sampling.truncate_prompt_tokens is {kept}: it must be 1 or more, or -1 for what the context leaves"
        )
        _check_token_ids("stop_token_ids", self.stop_token_ids or [])
        _check_logit_bias(self.logit_bias or {})
        check_template_kwargs(self.chat_template_kwargs or {})
        check_structured(self.structured_outputs or {})
        _check_markers(self.markers)

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """stop_token_ids as a set: rows may have hundreds, and each token is looked up."""
        return frozenset(self.stop_token_ids or ())

    @property
    def most_new_tokens(self) -> int:
        """max_new_tokens, or its default where nobody has said it."""
        return int(OPEN["max_new_tokens"]) if self.max_new_tokens is None else self.max_new_tokens

    @property
    def bad_texts(self) -> list[str]:
        return [self.bad_words] if isinstance(self.bad_words, str) else self.bad_words or []

    @property
    def markers(self) -> list[str]:
        """The two reasoning_markers, or none where there are to be none, or nobody has said."""
        given = self.reasoning_markers or []
        return (given.split(",") if given != "none" else []) if isinstance(given, str) else given

    @property
    def scores_prompt(self) -> bool:
        return self.prompt_logprobs or self.max_new_tokens == 0

    def check(self) -> "Sampling":
        """These settings, if their keys agree: a row's own may contradict the run's. Raises InputError."""
        most = self.most_new_tokens
        require(
            most > 0 or self.prompt_logprobs or self.logprobs is not None,
            "sampling.max_new_tokens is 0, which scores the prompt: say so with prompt_logprobs = true,"
            " or generate at least 1",
        )
        alone = most > 0 or self.n == 1
        require(alone, f"sampling.n is {self.n}, but with max_new_tokens 0 there is nothing to sample")
        require(
            self.min_new_tokens <= most,
            f"sampling.min_new_tokens is {self.min_new_tokens}, more than max_new_tokens ({most}): lower it",
        )
        constraints = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        require(
            len(constraints) <= 1,
            f"sampling.{' and sampling.'.join(constraints)} are given: a row has one constraint, give one of them",
        )
        require(
            not (constraints and self.ignore_eos) or self.structured_outputs == {},
            f"sampling.{''.join(constraints)} ends a row by the model's end token, which ignore_eos excludes: leave one out",
        )
        return self

    def override(self, keys: Mapping[str, Any], otherwise: Mapping[str, Any] = MappingProxyType({})) -> "Sampling":
        """These settings with a row's own keys, and `otherwise`, else OPEN, for what is open still.

        An integer may come as a float, as pandas writes a column of integers in which one is missing. Raises InputError for
        a value of the wrong type or range.
        """
        known = types_of(Sampling)
        own = {name: checked(as_integers(value, known[name]), known[name], name) for name, value in keys.items()}
        defaults = {**OPEN, **otherwise}
        return replace(self, **({name: defaults[name] for name in self.left_open} | own))

    @property
    def left_open(self) -> list[str]:
        """The keys that nobody has said yet."""
        return [name for name in OPEN if getattr(self, name) is None]


# What a key is that neither row, nor run, nor model says.
OPEN: dict[str, Any] = {
    "max_new_tokens": 256,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
}
# Those that are others for a line of OpenAI's batch format: it goes on as far as the context lets it.
OPEN_IN_REQUESTS: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 2**31 - 1}
CONSTRAINTS = ("structured_outputs", "json_schema", "regex", "choice")
RUN_KEYS = ("generation_config", "json_schema", "regex", "choice", "reasoning_markers")  # never a row's
ROW_KEYS = tuple(name for name in types_of(Sampling) if name not in RUN_KEYS)


def whole(value: Any) -> Any:
    """A float that is an integer, exactly, as an int; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


def as_integers(value: Any, kind: Any) -> Any:
    """The value, with integers in the place of floats where the key has no other numbers."""
    kinds = get_args(kind) or (kind,)
    if list in kinds and isinstance(value, list):
        return [whole(one) for one in value]
    return whole(value) if int in kinds else value


# Least and most of the keys that are numbers; None is never given.
_SAMPLING_RANGES = {
    "max_new_tokens": (0, float("inf")),
    "min_new_tokens": (0, float("inf")),
    "temperature": (0, float("inf")),
    "min_p": (0, 1),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "n": (1, 4096),
    "logprobs": (0, 100),
    "thinking_token_budget": (0, float("inf")),
}
MAX_STOPS, MAX_BAD_WORDS, MAX_STOP_LENGTH = 64, 1000, 1000


def _check_texts(name: str, texts: list[Any], most: int) -> None:
    require(len(texts) <= most, f"sampling.{name} has {len(texts)} texts: it must be at most {most}")
    for text in texts:
        right = isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH
        require(right, f"sampling.{name} has {str(text)[:20]!r}: it must be texts of 1 to {MAX_STOP_LENGTH} characters")


def _check_token_ids(name: str, ids: Iterable[Any]) -> None:
    for token_id in ids:
        right = type(token_id) is int and 0 <= token_id < 2**31
        require(right, f"sampling.{name} has {str(token_id)[:20]!r}: it must be token ids, integers from 0")


def _check_markers(markers: list[str]) -> None:
    right = len(markers) in (0, 2) and all(isinstance(one, str) and one and one == one.strip() for one in markers)
    require(
        right and len(set(markers)) == len(markers),
        f"sampling.reasoning_markers is {str(markers)[:60]}: it must be two different texts without blanks around them,"
        " where the thinking begins and where it ends, such as '<think>,</think>', or none",
    )


def _check_logit_bias(bias: Mapping[str, Any]) -> None:
    # JSON and TOML have texts for keys: "50" is the token id 50, "050" and "+50" are nobody's.
    right = {text: int(text) if text.isascii() and text.isdigit() and len(text) < 11 else text for text in bias}
    _check_token_ids("logit_bias", (token_id if str(token_id) == text else text for text, token_id in right.items()))
    for text, value in bias.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1000
        require(number, f"sampling.logit_bias has {str(value)[:20]} for {text}: it must be a number in -1000 .. 1000")
