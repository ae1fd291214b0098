"""Whether windowed layers keep their window alone: a ring a row, or the pages of all its tokens, whichever takes less."""

from noria.model import ModelShape
from noria.plan.rounds import Workload
from noria.step import PAGE_TOKENS, pages_for
from noria.tools.text import nbytes_words, plural

ENDED = 0.25  # of the new tokens that a row may have: with pages it would take no more where rows end there


def keeping(shape: ModelShape, workload: Workload, dtype: str, whole: bool) -> tuple[ModelShape, str]:
    """The shape with rings or without, whatever it had; and what people are told of that, nothing where there are no windows.

    Pages follow what rows turn out to need, rings do not: so rings must take less even where rows end early. `whole`: none does.
    """
    paged = shape.without_rings()
    count, rings = len(windowed(paged)), paged.with_rings()
    if not count:
        return paged, ""
    said = f"{plural(count, 'layer')} with windows"
    if why := _refusal(paged, rings):
        return paged, f"{said} keep all tokens of a row: {why}"
    in_pages, in_rings = row_nbytes(paged, workload, dtype, 1 if whole else ENDED), row_nbytes(rings, workload, dtype)
    if in_rings >= in_pages:
        return paged, f"{said} keep all tokens of a row: a row's windows would take no less ({nbytes_words(in_rings)})"
    kept = count - len(windowed(rings))
    tokens = " and ".join(f"{ring:,}" for ring in sorted({*rings.rings.values()}))
    others = f"; {plural(count - kept, 'other')}, which later layers read, all" if count > kept else ""
    return rings, f"{plural(kept, 'layer')} with windows keep the last {tokens} tokens of a row{others}"


def windowed(shape: ModelShape) -> list[int]:
    """The layers with arrays that are read by a window, of which pages keep all tokens."""
    layers = ((layer, shape.arrays(layer)) for layer in range(shape.num_layers))
    return [layer for layer, own in layers if any(array.window and not array.ring for array in own)]


def row_nbytes(shape: ModelShape, workload: Workload, dtype: str, ended: float = 1.0) -> int:
    """Bytes that a row takes in the caches of all layers, beside what it shares: with this part of its new tokens."""
    every = [range(shape.num_layers)]
    tokens = workload.computed_tokens + workload.new_tokens * ended
    pages = pages_for(max(round(tokens), 1)) * PAGE_TOKENS * shape.cache_nbytes(every, dtype)
    return pages + shape.cache_nbytes(every, dtype, "sequence")


def _refusal(paged: ModelShape, rings: ModelShape) -> str:
    """Why there are no rings; empty where there may be."""
    if paged.cache_encoding:
        return "the cache is encoded"
    if paged.has_states:
        return "the family has states too"
    return "" if rings.rings else "later layers read them"
