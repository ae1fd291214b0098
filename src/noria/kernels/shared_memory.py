"""How much shared memory a program may have: kernels are compiled with as many stages as find room there."""

from functools import lru_cache

import torch


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it; on a CPU, where kernels are interpreted, without a limit."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    found: int = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return found
