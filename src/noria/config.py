"""The run file and its flags: frozen dataclasses that say what a run needs, and refuse what they do not understand.

A key of the run file is a field here and a flag of the same name. Knows nothing of files, ranks or devices.
"""

import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

MAX_GROUPS = 10_000  # as many as engine/order.py has tags for
DTYPES = ("float64", "float32", "bfloat16", "float16")

# Keys of the design that this version refuses by name instead of taking them for a typing error.
NOT_YET = {
    "sampling": "min_new_tokens min_p repetition_penalty presence_penalty frequency_penalty logit_bias stop"
    " stop_token_ids logprobs n chat system",
    "pipeline": "schedule",
    "placement": "weights cache activations cpu_memory scratch stage",
    "job": "walltime retry_errors extend trace strict machine",
}


class InputError(ValueError):
    """The user's input is wrong: the message says what, where, the numbers and the remedy. The command exits with 2."""


WHOLE = "1/1"  # the shard that is the whole run


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of the shard `i/n`, both from 1. Raises InputError."""
    number, slash, count = (part.strip() for part in text.partition("/"))
    digits = all(part.isascii() and part.isdigit() and len(part) < 10 for part in (number, count))
    require(slash and digits, f"job.shard is {text!r}: it must be i/n, such as 1/4 for the first of four shards")
    i, n = int(number), int(count)
    require(n >= 1 and 1 <= i <= n, f"job.shard is {text!r}: shards count from 1, so i/{n} goes from 1/{n} to {n}/{n}")
    return i, n


def shard_rows(shard: str | None, num_rows: int) -> range:
    """The rows of `num_rows` prompts that a shard generates: every n-th, so that prompts added later move no row."""
    i, n = parse_shard(shard or WHOLE)
    return range(i - 1, num_rows, n)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` if a known word is near, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def key(help: str, default=None, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled. Every key may stand in a row of the prompts too, where it overrides the run's."""

    max_new_tokens: int = key("tokens to generate at most, per row", 256)
    temperature: float = key("0 takes the most likely token; above 0 the distribution's sharpness", 0.0)
    top_k: int = key("sample among the k most likely tokens (0: all)", 0)
    top_p: float = key("sample among the most likely tokens that together have this probability", 1.0)
    seed: int | None = key("seed of the random numbers; a sampled run without one draws it and stores it")
    ignore_eos: bool = key("go on to max_new_tokens whatever the model says", False)

    def __post_init__(self):
        require(self.max_new_tokens >= 1, f"sampling.max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        require(0 <= self.temperature < float("inf"), f"sampling.temperature is {self.temperature}: it must be 0 or more")
        require(0 <= self.top_k < 2**31, f"sampling.top_k is {self.top_k}: it must be in 0 (all tokens) .. 2^31-1")
        require(0 < self.top_p <= 1, f"sampling.top_p is {self.top_p}: it must be above 0 and at most 1")
        require(self.seed is None or 0 <= self.seed < 2**63, f"sampling.seed is {self.seed}: it must be in 0 .. 2^63-1")

    def override(self, keys: Mapping) -> "Sampling":
        """These settings with a row's own keys. Raises InputError for a value of the wrong type or range."""
        types_of = _types(Sampling)
        return replace(self, **{name: checked(value, types_of[name], name) for name, value in keys.items()})


@dataclass(frozen=True)
class Pipeline:
    """How the layers are cut and how sequences travel. None: planned."""

    laps: int | None = key("times that a token goes round the ring in one step: virtual stages per rank (V)")
    groups: int | None = key("groups of sequences in flight (M)")
    microbatches: int = key("least number of microbatches in a step (K)", 1)
    step_tokens: int | None = key("new tokens in one step of a group, at most")
    microbatch_tokens: int | None = key("new tokens in one microbatch, at most")
    partition: str | list = key(
        "layers per virtual stage: greedy (equal, the first get the remainder), balanced (weighs head and"
        " embedding), or a list such as 10,10,11,9",
        "greedy",
    )
    transport: str = key("how hidden states travel", "auto", ("auto", "mpi_device", "mpi_host"))
    blocking: bool = key("the textbook ring of blocking sends and receives; needs 2 <= groups <= ranks", False)

    def __post_init__(self):
        for name in ("laps", "groups", "microbatches", "step_tokens", "microbatch_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"pipeline.{name} is {value}: it must be at least 1")
        groups = self.groups or 1
        require(groups <= MAX_GROUPS, f"pipeline.groups is {groups}: it must be at most {MAX_GROUPS}")
        if isinstance(self.partition, str):
            known = ("greedy", "balanced")
            require(
                self.partition in known,
                f"pipeline.partition is {self.partition!r}{nearest(self.partition, known)}; it is greedy, balanced or"
                " a list of layer counts",
            )
        else:
            counts = all(isinstance(count, int) and count >= 1 for count in self.partition)
            require(counts, f"pipeline.partition is {self.partition}: every virtual stage needs at least 1 layer")


@dataclass(frozen=True)
class Placement:
    """Where bytes live. All sizes are per rank."""

    gpu_memory: str | None = key('memory of the device that a rank may use, such as "16GiB" (default: 90 % of what is free)')


@dataclass(frozen=True)
class Job:
    """How the job runs and ends."""

    seal_seconds: float = key("finished rows are sealed to disk this often", 10.0)
    overwrite: bool = key("move an existing output aside and begin again", False)
    allow_gpu_sharing: bool = key("let two ranks use one GPU", False)
    random_weights: str | None = key("a config.json: run its shape with random weights made in place, without a model")
    shard: str | None = key(
        "i/n: generate only every n-th row, from row i on (1/4, 2/4, 3/4, 4/4: as job arrays count from 1);"
        " each shard is a job with an output of its own, which noria merge makes into one"
    )

    def __post_init__(self):
        require(self.seal_seconds >= 0, f"job.seal_seconds is {self.seal_seconds}: it must be 0 or more")
        if self.shard is not None:
            parse_shard(self.shard)


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    model: str | None = key("checkpoint made by noria convert")
    prompts: str | None = key("file of prompts: .jsonl or .txt")
    output: str | None = key("HDF5 file for the generations")
    dtype: str = key("numbers to compute in (auto: the checkpoint's on a GPU, float32 on a CPU)", "auto", ("auto", *DTYPES))
    device: str = key("auto takes the GPU where there is one", "auto", ("auto", "cuda", "cpu"))
    sampling: Sampling = field(default_factory=Sampling)
    pipeline: Pipeline = field(default_factory=Pipeline)
    placement: Placement = field(default_factory=Placement)
    job: Job = field(default_factory=Job)

    def __post_init__(self):
        if self.job.random_weights:
            require(self.model is None, "model and job.random_weights contradict each other: give one of them")
        else:
            require(self.model, "no model: give model = FILE.h5 in the run file or --model FILE.h5")
        require(self.prompts, "no prompts: give prompts = FILE in the run file or --prompts FILE")
        require(self.output, "no output: give output = FILE.h5 in the run file or --output FILE.h5")
        sampled = self.sampling.temperature > 0 and self.sampling.seed is None
        require(
            not (self.job.shard and sampled),
            f"job.shard is {self.job.shard}, sampling.temperature {self.sampling.temperature:g} and there is no seed:"
            " every shard would draw its own; give all of them the same sampling.seed (--seed 1)",
        )

    def to_toml(self) -> str:
        """The run file that gives this run again: every key that is set."""
        lines = _toml_lines(self)
        for section in SECTIONS:
            lines += ["", f"[{section}]", *_toml_lines(getattr(self, section))]
        return "\n".join(lines) + "\n"


SECTIONS = {"sampling": Sampling, "pipeline": Pipeline, "placement": Placement, "job": Job}


def _toml_lines(keys) -> list[str]:
    values = {f.name: getattr(keys, f.name) for f in fields(keys) if f.name not in SECTIONS}
    return [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]


def require(condition, message: str) -> None:
    """Raises InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def load(path: str | Path | None, flags: Mapping[str, object] | None = None) -> Config:
    """The run of a TOML file with flags over it.

    `flags` maps plain key names (`max_new_tokens`) to values. Raises InputError, naming the nearest right key, for what it
    does not know.
    """
    tree = _read(path) if path else {}
    for name, value in (flags or {}).items():
        section = section_of(name)
        keys = tree.setdefault(section, {}) if section else tree
        _require_section(section, keys)
        keys[name] = value
    return _build(tree)


def section_of(name: str) -> str | None:
    """The section that the key belongs to, or None for a key of the run file's top level."""
    for section, kind in SECTIONS.items():
        if name in _types(kind) or name in NOT_YET[section].split():
            return section
    return None


def _read(path: str | Path) -> dict:
    try:
        text = Path(path).read_bytes()
        return tomllib.loads(text.decode())
    except OSError as error:
        raise InputError(f"run file {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"run file {path} is not TOML: {error}") from error


def _build(tree: Mapping) -> Config:
    values = {}
    for name, value in tree.items():
        if name in SECTIONS:
            _require_section(name, value)
            values[name] = _section(name, value)
        else:
            values[name] = _value("", Config, name, value)
    return Config(**values)


def _require_section(name: str | None, value) -> None:
    require(isinstance(value, dict), f"{name} is a section of the run file: write [{name}]")


def _section(section: str, tree: Mapping):
    kind = SECTIONS[section]
    return kind(**{name: _value(f"{section}.", kind, name, value) for name, value in tree.items()})


def _value(prefix: str, kind: type, name: str, value):
    known = _types(kind)
    if name not in known:
        other = section_of(name)
        if other and name in NOT_YET[other].split():
            raise InputError(f"{other}.{name} is not in this version of Noria yet")
        if other or name in _types(Config):
            raise InputError(f"unknown key {prefix}{name}: it belongs in {f'[{other}]' if other else 'the top of the file'}")
        everything = [*known, *SECTIONS] if kind is Config else known
        raise InputError(f"unknown key {prefix}{name}{nearest(name, everything)}")
    value = checked(value, known[name], prefix + name)
    choices = next(f for f in fields(kind) if f.name == name).metadata["choices"]
    if choices and value not in choices:
        raise InputError(f"{prefix}{name} is {value!r}{nearest(str(value), choices)}; it is one of {', '.join(choices)}")
    return value


@functools.cache  # every row of the prompts asks
def _types(kind: type) -> dict:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if f.name not in SECTIONS}


def checked(value, kind, name: str):
    """`value` if it is of this type (an int will do for a float). Raises InputError that names the key."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**63, f"{name} is {str(value)[:20]}...: the number is too large")
        return float(value)
    exact = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not exact:
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise InputError(f"{name} is {value!r}: it must be {wanted}")
    return value


def parse_nbytes(text: str, name: str) -> int:
    """Bytes of a size such as `16GiB`, `500MB` or `1048576`. Raises InputError that names the key."""
    units = {"": 1, "B": 1} | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    digits = text.strip().rstrip("BKMGTi ")
    unit = text.strip()[len(digits) :].strip()
    try:
        return int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"{name} is {text!r}: it must be a size such as 16GiB or 500MB") from None
