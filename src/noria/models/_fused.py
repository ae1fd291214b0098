"""What a layer does between its products, by kernels of few launches where they can be built; each beside its plain twin.

Kernels are used on CUDA devices in half precisions. Functions of tensors: nothing of ranks, streams or files.
T tokens, E hidden, H heads, Hkv key/value heads, D head dim, I intermediate.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F

from noria import kinds
from noria.model import ModelShape
from noria.models import _rotary
from noria.models._rotary import Rotary

DTYPES = (torch.float16, torch.bfloat16)
WIDEST_ROW, WIDEST_HEAD = 16384, 512
LARGEST_ERROR = 0.05  # of numbers of about 1 in half precisions: more is no rounding
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The norms of rows [T, E]: LayerNorm with a bias, else RMSNorm."""
    if _takes(hidden):
        normed: torch.Tensor = _kernel("norm").norm(hidden, weight, bias, eps)
        return normed
    return plain_norm(hidden, weight, eps, bias)


def plain_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if bias is None:
        return F.rms_norm(hidden, weight.shape, weight, eps)
    return F.layer_norm(hidden, weight.shape, weight, bias, eps)


def add_norm(
    branch: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of what a branch of a layer returned and the hidden states before it, [T, E], and its norms.

    The sum stands in the branch's memory; hidden states are left as they are.
    """
    if _takes(hidden):
        return branch, _kernel("norm").norm(hidden, weight, bias, eps, branch)
    return plain_add_norm(branch, hidden, weight, eps, bias)


def plain_add_norm(
    branch: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    total = branch.add_(hidden)
    return total, plain_norm(total, weight, eps, bias)


def gated(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """[..., I] of gates and ups [..., 2 * I], the gates first: activation(gate) * up."""
    if gate_up.dim() == 2 and by_kernels(gate_up):
        inner: torch.Tensor = _kernel("gated").gated(gate_up, activation)
        return inner
    return plain_gated(gate_up, activation)


def plain_gated(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


def rotate_and_write(
    queries: torch.Tensor,
    rotary: Rotary,
    new: Sequence[torch.Tensor],
    arrays: Sequence[torch.Tensor],
    rows: torch.Tensor,
) -> torch.Tensor:
    """Queries [T, H, D] as they attend, once the `new` of each token is written to these rows of a layer's arrays.

    The first of the new are keys, which become what queries do: normed, each head, and turned (see Rotary).
    """
    if _writes(queries, new, arrays):
        made: torch.Tensor = _kernel("rotary").rotate_and_write(queries, rotary, new, arrays, rows)
        return made
    return plain_rotate_and_write(queries, rotary, new, arrays, rows)


def plain_rotate_and_write(
    queries: torch.Tensor,
    rotary: Rotary,
    new: Sequence[torch.Tensor],
    arrays: Sequence[torch.Tensor],
    rows: torch.Tensor,
) -> torch.Tensor:
    cosines, sines, pairs, norms, eps = rotary
    made = [queries, *new[:1]]
    if norms is not None:
        made = [plain_norm(heads, weight, eps) for heads, weight in zip(made, norms, strict=False)]
    if cosines is not None and sines is not None:
        turn = _rotary.rotate_pairs if pairs else _rotary.rotate
        made = [turn(heads, cosines, sines) for heads in made]
    for array, its in zip(arrays, [*made[1:], *new[1:]], strict=True):
        array.index_copy_(0, rows, its if its.dim() == 3 else its[:, None])
    return made[0]


def by_kernels(like: torch.Tensor) -> bool:
    """Whether numbers in this dtype on this device are computed by kernels."""
    return not refuses(like.device, like.dtype)


def _takes(hidden: torch.Tensor) -> bool:
    return hidden.dim() == 2 and hidden.shape[1] <= WIDEST_ROW and not refuses(hidden.device, hidden.dtype)


def _writes(queries: torch.Tensor, new: Sequence[torch.Tensor], arrays: Sequence[torch.Tensor]) -> bool:
    """Keys and values of heads, and nothing else, written as they are computed."""
    if len(new) != 2 or new[0].dim() != 3 or not by_kernels(queries):
        return False
    return max(queries.shape[2], new[1].shape[2]) <= WIDEST_HEAD and arrays[0].dtype == queries.dtype


@lru_cache
def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels do not compute in this dtype on this device; empty where they do. They are built and tried once."""
    if device.type != "cuda":
        return f"they need a CUDA device, this is the {device.type.upper()}"
    if dtype not in DTYPES:
        return f"they compute float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        largest = _largest_error(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever Triton, its compiler and its driver raise
        words = str(error).strip() or type(error).__name__
        return f"they cannot be built: {words.splitlines()[0][:200]}"
    return "" if largest < LARGEST_ERROR else "they give other results than torch"


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of a kernel to its plain twin, for a few rows of sizes that fill no block."""
    draw = torch.Generator().manual_seed(0)
    hidden, branch, weight, bias = (
        torch.randn(size, generator=draw).to(device, dtype) for size in ((3, 200), (3, 200), (200,), (200,))
    )
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for its in (None, bias):
        sums = branch.clone(), branch.clone()
        found = sums[0], _kernel("norm").norm(hidden, weight, its, 1e-6, sums[0])
        pairs += zip(found, plain_add_norm(sums[1], hidden, weight, 1e-6, its), strict=True)
    pairs += [(_kernel("gated").gated(hidden, name), plain_gated(hidden, name)) for name in ACTIVATIONS]
    return max(float((one - other).abs().max()) for one, other in pairs)


def build(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> str:
    """Builds what the layers of a model launch. Returns why nothing is built and used; empty where it is."""
    why = refuses(device, dtype)
    if why:
        return why
    row = torch.zeros(1, shape.hidden_size, dtype=dtype, device=device)
    if shape.hidden_size <= WIDEST_ROW:
        norm(row, row[0], 1e-6)
        add_norm(row.clone(), row, row[0], 1e-6)
    experts = shape.details.get("experts")
    inner = {shape.details.get("intermediate_size"), experts.shared if experts else 0}
    for width in filter(None, inner):
        gated(torch.zeros(1, 2 * width, dtype=dtype, device=device))
    return ""


@lru_cache
def _kernel(name: str) -> ModuleType:
    """What launches a kernel: it needs triton, which is there where there is a GPU."""
    return kinds.load("kernels", name)
