"""What the program around a model knows of it: its sizes, and what a run reads of it. Knows no torch and no file format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from noria.blocks import DTYPE_NBYTES, Block

MORE_TEMPLATES = "additional_chat_templates.json"  # the folder of this name as one file: name -> template


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the program around it needs; `details` holds what its family alone understands."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool
    mixture_size: int = 0  # numbers that a token takes while a mixture of experts is computed
    experts_share: float = 1.0  # of a mixture's experts, those that one token goes to
    end_words: str = ""  # why no position beyond max_positions can be computed, where config.json says so
    details: Mapping[str, Any] = field(default_factory=dict)

    def cache_nbytes_per_token(self, dtype: str) -> int:
        """Bytes of K and V that one token occupies in one layer's cache."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_NBYTES[dtype]


class OpenModel(Protocol):
    """A model as a run reads it: a Checkpoint, which says what the attributes are, or random weights."""

    path: Path
    shape: ModelShape
    family: str
    dtype: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    blocks: dict[str, Block]
    tokenizer: dict[str, bytes]
    header_hash: str
    nbytes: int

    def read_block(self, name: str, into: bytearray | memoryview) -> None: ...

    def close(self) -> None: ...
