"""The run file and its flags: frozen dataclasses that say what a run needs, and refuse what they do not understand.

A key of the run file is a field here and a flag of the same name. Knows nothing of files, ranks or devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from noria.arrays import ENCODINGS
from noria.errors import InputError, require
from noria.job import Job
from noria.limits import DTYPES, MAX_GROUPS
from noria.sampling import Sampling
from noria.tools.keys import check_path, checked, key, nearest, types_of
from noria.tools.toml import has_null, read_toml, toml_lines
from noria.tools.values import check_shares, parse_nbytes

MAX_RUN_FILE = 2**18  # bytes
SCHEDULES = ("sequential", "single_batch", "multi_batch")


@dataclass(frozen=True)
class Pipeline:
    """How the layers are cut and how sequences travel. None: planned."""

    laps: int | None = key(
        "how many times a token goes round the ring in one step: virtual stages per rank (V) (default: planned)"
    )
    groups: int | None = key("number of groups of sequences in flight (M) (default: planned)")
    microbatches: int = key("minimum number of microbatches in a step (K)", 1)
    step_tokens: int | None = key("maximum number of new tokens in one step of a group (default: planned)")
    microbatch_tokens: int | None = key("maximum number of new tokens in one microbatch (default: planned)")
    partition: str | list[int] | None = key(
        "layers per virtual stage: greedy (equal numbers, the first stages get the remainder), balanced (counts the cost of"
        " head and embedding), or a list such as 10,10,11,9 (default: planned)"
    )
    schedule: str | None = key(
        "how copies overlap compute: sequential (no overlap), single_batch (the weights and cache of the next layer load"
        " during this one), multi_batch (the cache of the neighbouring microbatches too) (default: planned: multi_batch if"
        " cache or activations are not on the GPU, else single_batch)",
        None,
        SCHEDULES,
    )
    transport: str = key(
        "how hidden states travel: mpi_device passes GPU memory to MPI, mpi_host copies through CPU memory",
        "auto",
        ("auto", "mpi_device", "mpi_host"),
    )
    exact_bits: bool = key(
        "on GPUs in bfloat16 and float16, compute a row to the same bits whatever rows are beside it: products are never"
        " split along their inputs",
        True,
    )
    graphs: bool = key(
        "on GPUs, capture decode steps of layers that stay on the device as CUDA graphs and replay them: the host has less"
        " to do, tokens are the same",
        True,
    )
    blocking: bool = key("use blocking sends and receives, as in textbooks; needs 2 <= groups <= ranks", False)
    prefix_sharing: bool = key(
        "rows whose token ids begin alike compute that beginning once and share its cache, n samples of a prompt too",
        True,
    )

    def __post_init__(self) -> None:
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
        elif self.partition is not None:
            counts = all(isinstance(count, int) and count >= 1 for count in self.partition)
            require(counts, f"pipeline.partition is {self.partition}: every virtual stage needs at least 1 layer")


@dataclass(frozen=True)
class Placement:
    """Where bytes live. All sizes are per rank."""

    weights: dict[str, Any] | None = key(
        "where layers and head are kept: shares in %, gpu=60,cpu=40, or sizes, which are filled in this order,"
        " gpu=40GiB,cpu=60GiB,disk=1TiB, or the blocks themselves, 'gpu=embed layers 0-3 head,cpu=layers 4-11'"
        " (default: planned: first the GPU, then CPU memory, then disk)",
        text=True,
    )
    cache: dict[str, Any] | None = key(
        "where the KV cache is kept: shares of the sequences in %, gpu=20,cpu=80, or sizes, gpu=10GiB,cpu=40GiB, or pages of 16"
        " tokens, 'gpu=640 pages' (default:"
        " planned: on the GPU, and in CPU memory if that is faster)",
        text=True,
    )
    activations: str | None = key("where hidden states of waiting groups are kept (default: gpu)", None, ("gpu", "cpu"))
    gpu_memory: str | None = key('device memory that a rank may use, such as "16GiB" (default: 90 % of what is free)')
    cpu_memory: str | None = key(
        "host memory that a rank may use for weights, cache and activations (default: 90 % of what is free: the rank's"
        " share of what the machine and the job's limit, SLURM's --mem, leave)"
    )
    scratch: str | None = key(
        "folder on a local disk of the node, for a cache on disk and for stage; the run removes its files from it (default:"
        " $SLURM_TMPDIR; else $TMPDIR, else the output's folder)"
    )
    compress_weights: str = key(
        "code bfloat16 weights that stream to a GPU from CPU memory, or from scratch by stage, without loss while they load:"
        " where the plan gains by it and the load takes at most a tenth longer, or not at all",
        "auto",
        ("auto", "off"),
    )
    stage: bool = key("copy the weights of the disk tier to scratch once, and read them there", False)

    def __post_init__(self) -> None:
        for name in ("weights", "cache"):
            if getattr(self, name) is not None:
                check_shares(f"placement.{name}", getattr(self, name), of_blocks=name == "weights")
        for name in ("gpu_memory", "cpu_memory"):
            if getattr(self, name) is not None:
                parse_nbytes(getattr(self, name), f"placement.{name}")


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    model: str | None = key("checkpoint made by noria convert")
    prompts: str | list[str] = key(
        "file of prompts: .jsonl, .json, .txt, .csv, .tsv (each also as .gz or .zst), .h5 or .parquet; several files, or a"
        " pattern such as 'part-*.jsonl', are read one after another"
    )
    output: str = key("HDF5 file for the generations")
    prompt_column: str | None = key(
        "column that holds the prompt; several, such as instruction,input, are joined; doc.question is a place within a"
        " column (default: prompt)",
        text=True,
    )
    id_column: str | None = key("column that holds the id (default: id)", text=True)
    messages_column: str | None = key("column that holds the conversation (default: messages)", text=True)
    limit: int | None = key(
        "read only this many rows, to try; the same command without it continues with the others (default: all rows)"
    )
    max_context: int | None = key(
        "maximum length of a row: tokens of its prompt and its generation together (default: the model's: by its config.json)"
    )
    dtype: str = key(
        "number format of the computation (auto: the checkpoint's on a GPU, float32 on a CPU)",
        "auto",
        ("auto", *DTYPES),
    )
    kv_cache_dtype: str = key(
        "number format of the cache of keys and values (auto: that of the computation); fp8, int8 and int4 round each key and"
        " value once and give room for two to four times as many rows, but are decoded in each step",
        "auto",
        ("auto", *ENCODINGS),
    )
    products: str = key(
        "number format of the products of layers whose weights are stored in fp8 (auto: that of the computation, weights are"
        " decoded); fp8 rounds each token's activations too and multiplies codes by codes: numbers are others",
        "auto",
        ("auto", "fp8"),
    )
    device: str = key("where to compute; auto takes the GPU if there is one", "auto", ("auto", "cuda", "cpu"))
    sampling: Sampling = field(default_factory=Sampling)
    pipeline: Pipeline = field(default_factory=Pipeline)
    placement: Placement = field(default_factory=Placement)
    job: Job = field(default_factory=Job)

    def __post_init__(self) -> None:
        if self.job.random_weights:
            require(self.model is None, "model and job.random_weights contradict each other: give one of them")
        else:
            require(self.model, "no model: give model = FILE.h5 in the run file or --model FILE.h5")
        require(self.prompts, "no prompts: give prompts = FILE in the run file or --prompts FILE")
        names = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        require(all(isinstance(name, str) and name for name in names), f"prompts is {names}: it must be names of files")
        require(self.limit is None or self.limit >= 1, f"limit is {self.limit}: it must be at least 1")
        most = self.max_context
        require(most is None or 1 <= most < 2**31, f"max_context is {most}: it must be 1 to {2**31 - 1}")
        self.sampling.check()
        require(
            not has_null(self.sampling.chat_template_kwargs),
            "sampling.chat_template_kwargs has null, which no run file can hold: leave the key out",
        )
        require(
            not has_null(self.sampling.structured_outputs),
            "sampling.structured_outputs has null, which no run file can hold: give a schema as a file, by json_schema",
        )
        require(self.output, "no output: give output = FILE.h5 in the run file or --output FILE.h5")
        paths = {"model": self.model, "output": self.output, "placement.scratch": self.placement.scratch}
        paths |= {f"job.{name}": getattr(self.job, name) for name in ("random_weights", "trace", "machine")}
        paths["sampling.json_schema"] = self.sampling.json_schema
        for name, path in [*paths.items(), *(("prompts", name) for name in names)]:
            check_path(path, name)

    def to_toml(self) -> str:
        """The run file that gives this run again: every key that is set."""
        lines = toml_lines(_values(self))
        for section in SECTIONS:
            lines += ["", f"[{section}]", *toml_lines(_values(getattr(self, section)))]
        return "\n".join(lines) + "\n"


def _values(keys: Any) -> dict[str, Any]:
    return {f.name: getattr(keys, f.name) for f in fields(keys) if f.name not in SECTIONS}


SECTIONS = {"sampling": Sampling, "pipeline": Pipeline, "placement": Placement, "job": Job}


def load(path: str | Path | None, flags: Mapping[str, object] | None = None) -> Config:
    """The run of a TOML file with flags over it.

    `flags` maps plain key names (`max_new_tokens`) to values. Raises InputError, naming the nearest right key, for what it
    does not know.
    """
    tree = read_toml(path, "run file", MAX_RUN_FILE) if path else {}
    for name, value in (flags or {}).items():
        section = section_of(name)
        keys = tree.setdefault(section, {}) if section else tree
        _require_section(section, keys)
        keys[name] = value
    return _build(tree)


def section_of(name: str) -> str | None:
    """The section that the key belongs to, or None for a key of the run file's top level."""
    for section, kind in SECTIONS.items():
        if name in types_of(kind):
            return section
    return None


def _build(tree: Mapping[str, Any]) -> Config:
    values = {}
    for name, value in tree.items():
        if name in SECTIONS:
            _require_section(name, value)
            values[name] = _section(name, value)
        else:
            values[name] = _value("", Config, name, value)
    return Config(**values)


def _require_section(name: str | None, value: Any) -> None:
    require(isinstance(value, dict), f"{name} is a section of the run file: write [{name}]")


def _section(section: str, tree: Mapping[str, Any]) -> Any:
    kind = SECTIONS[section]
    return kind(**{name: _value(f"{section}.", kind, name, value) for name, value in tree.items()})


def _value(prefix: str, kind: type, name: str, value: Any) -> Any:
    known = types_of(kind)
    if name not in known:
        other = section_of(name)
        if other or name in types_of(Config):
            raise InputError(
                f"unknown key {prefix}{name}: it belongs in {f'[{other}]' if other else 'the top of the file'}"
            )
        everything = [*known, *SECTIONS] if kind is Config else known
        raise InputError(f"unknown key {prefix}{name[:100]}{nearest(name[:100], everything)}")
    value = checked(value, known[name], prefix + name)
    choices = next(f for f in fields(kind) if f.name == name).metadata["choices"]
    if choices and value not in choices:
        raise InputError(
            f"{prefix}{name} is {value!r}{nearest(str(value), choices)}; it is one of {', '.join(choices)}"
        )
    return value
