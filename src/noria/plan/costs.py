"""What a placement costs: bytes on each rank. Estimates of work space are generous, so that a plan is kept.

Arithmetic on sizes alone: no torch, no MPI, no GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from noria.blocks import DTYPE_NBYTES, Block, ModelShape
from noria.plan.placement import blocks_of
from noria.step import PAGE_TOKENS

LOGITS_ROWS = 512  # rows whose logits the last rank holds at a time (engine.stage.HEAD_ROWS)
DRAW_NBYTES = 2**29  # sorted and cumulated float64 copies of a chunk of logits (engine.sampler.CHUNK_ELEMENTS)


@dataclass(frozen=True)
class Sizes:
    """A model cut into stages on ranks, and the steps that pass through them."""

    shape: ModelShape
    blocks: Mapping[str, Block]
    dtype: str
    num_ranks: int
    stages: list[range]
    groups: int
    step_tokens: int
    microbatch_tokens: int

    def fixed(self, rank: int) -> dict[str, int]:
        """Bytes that the rank needs besides its cache, by purpose."""
        return {"weights": self._weights(rank), "messages": self._messages(), "work space": self._work_space(rank)}

    def page(self, rank: int) -> int:
        """Bytes of one page of the cache in all layers of the rank."""
        layers = sum(len(stage) for stage in self.stages[rank :: self.num_ranks])
        return PAGE_TOKENS * self.shape.cache_nbytes_per_token(self.dtype) * layers

    def _held(self, rank: int) -> list[Block]:
        return [self.blocks[name] for name in blocks_of(rank, self.num_ranks, self.stages)]

    def _weights(self, rank: int) -> int:
        itemsize = DTYPE_NBYTES[self.dtype]
        return sum(block.nbytes * itemsize // DTYPE_NBYTES[block.dtype] for block in self._held(rank))

    def _messages(self) -> int:
        """A receive and a send buffer per group; one rank alone keeps a group's hidden states between laps."""
        buffers = 2 if self.num_ranks > 1 else int(len(self.stages) > 1)
        return buffers * self.groups * self.step_tokens * self.shape.hidden_size * DTYPE_NBYTES[self.dtype]

    def _work_space(self, rank: int) -> int:
        itemsize = DTYPE_NBYTES[self.dtype]
        layers = [block for block in self._held(rank) if block.name.startswith("layers/")]
        widest = max(parameter.shape[0] for block in layers for parameter in block.parameters)
        hidden = 2 * self.step_tokens * self.shape.hidden_size
        of_token = 8 * self.shape.hidden_size + max(3 * widest, self.shape.mixture_size)
        work = (hidden + self.microbatch_tokens * of_token) * itemsize
        if rank == self.num_ranks - 1:
            work += LOGITS_ROWS * self.shape.vocab_size * (itemsize + 4) + min(
                DRAW_NBYTES, 64 * LOGITS_ROWS * self.shape.vocab_size
            )
        return work


def head_in_layers(blocks: Mapping[str, Block]) -> tuple[float, float]:
    """What embedding and head weigh, in layers: the row gather nothing, the head by its bytes."""
    layers = [block.nbytes for name, block in blocks.items() if name.startswith("layers/")]
    return 0.0, blocks["head"].nbytes * len(layers) / sum(layers)
