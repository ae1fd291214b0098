"""What a layer finds of its cache: how it attends, the states of its sequences. Knows no pages and no kinds of attention.

T tokens and N sequences of a call, H heads, Hkv key/value heads, D head dim, Dv numbers of a value.
"""

from typing import Protocol

import torch

from noria.models._rotary import Rotary


class Cache(Protocol):
    """A layer's arrays (ModelShape.cache), for the tokens of one call."""

    def attend(
        self,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        soft_cap: float | None = None,
        rotary: Rotary | tuple[torch.Tensor, torch.Tensor] | None = None,
        values: str | int | None = None,
        **rows: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H, Dv]: what queries [T, H, D] attend to, once the new tokens' `rows` [T, ...] of each array are written.

        Keys are the first array that is given, [Hkv, D] or [D] a token; a layer that reads another's cache gives none, and
        keys are the first array of tokens there. Values are the array beside them; `values` names another, or says how many
        of the first numbers of a key are the value. scale: of the scores (default: D ** -0.5). window: the tokens that a
        query sees (default: all before it). rotary: what becomes of queries and new keys first (_rotary.Rotary, or its
        cosines and sines alone). soft_cap: c, where scores are c * tanh(score / c) (Gemma 2, arXiv 2408.00118). sinks [H]:
        the score of a key without a value, which takes weight from the others and is not capped (gpt-oss, arXiv 2508.10925).
        The family's shape says which layers have sinks or a cap, for which kernels are compiled before the first step.
        """
        ...

    @property
    def starts(self) -> torch.Tensor:
        """[N + 1] int64: the first token of each sequence, and T. Like all that follows where the family has states."""
        ...

    @property
    def kept(self) -> torch.Tensor:
        """[N] int64: after how many of its new tokens a sequence's state is to be given."""
        ...

    def before(self, name: str) -> torch.Tensor:
        """[N, ...]: the array per sequence as each sequence has it before its first new token; zeros where it begins."""
        ...

    def after(self, name: str, rows: torch.Tensor) -> None:
        """Gives the array [N, ...] as it is after each sequence's first `kept` new tokens: once in a call, for all."""
        ...
