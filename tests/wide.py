"""transformers in float64, its own casts to float32 too: norms, rotary positions, softmax, routers, corrections.

A family that rounds anything to float32 on the way would differ from it by 1e-7 and more.
"""

import torch
from torch.overrides import TorchFunctionMode

import families


class Wide(TorchFunctionMode):
    """Makes float64 of float32 wherever torch's functions are told a dtype, and asserts that none returns float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        kwargs = {key: torch.float64 if one is torch.float32 else one for key, one in (kwargs or {}).items()}
        result = function(*args, **kwargs)
        for one in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(one, torch.Tensor) or one.dtype != torch.float32, f"{function} gives float32"
        return result


def wide_model(config: dict, narrow: torch.nn.Module) -> torch.nn.Module:
    """The model of a config.json in float64, of the numbers of one in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            model = families.empty_model(config).double()
    finally:
        torch.set_default_dtype(torch.float32)
    numbers = {name: tensor.double() for name, tensor in narrow.state_dict().items()}
    model.load_state_dict(numbers, strict=True)
    return model


def logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """[T, V] in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            return model(torch.tensor([token_ids]), use_cache=False).logits[0]
    finally:
        torch.set_default_dtype(torch.float32)
