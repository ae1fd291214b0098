"""How many states a tier has beside its pages, and how many pages find room with them. Arithmetic alone."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Usual:
    """What the rows of a usual prompt hold together: pages, and states (0: the family has no arrays per sequence).

    prompts: so many have one more state among them, for a beginning that they share (0: none).
    """

    pages: int = 1
    states: int = 0
    prompts: int = 0

    def states_beside(self, pages: int) -> int:
        """The states of a tier with so many pages: as many rows have room in both, and one more shared beginning."""
        if pages <= 0 or not self.states:
            return 0
        prompts = -(-pages // self.pages)
        return prompts * self.states + 1 + (prompts // self.prompts if self.prompts else 0)

    def pools(self, pages: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """tier -> pool -> how many of it, for so many pages in each tier."""
        return {tier: {"pages": count, "states": self.states_beside(count)} for tier, count in pages.items()}

    def nbytes(self, pages: int, page: int, state: int) -> int:
        """Bytes of so many pages of `page` bytes with their states of `state` bytes."""
        return pages * page + self.states_beside(pages) * state

    def fitting(self, nbytes: int, page: int, state: int) -> int:
        """Pages that have room in so many bytes, with their states."""
        of_prompt = self.pages * page + self.states * state
        if not of_prompt:
            return 1 << 62  # a rank whose layers leave nothing
        together, one_more = max(self.prompts, 1), state * bool(self.prompts and self.states)
        whole = max((nbytes - state * bool(self.states)) * together // (of_prompt * together + one_more) + 1, 0)
        while whole and self.nbytes(whole * self.pages, page, state) > nbytes:
            whole -= 1
        rest = nbytes - whole * self.pages * page - self.states_beside(whole * self.pages + 1) * state
        more = min(rest // page, self.pages - 1) if page and rest > 0 else 0
        return whole * self.pages + more
