"""Whether an error says that memory did not suffice: torch has a class for its own, its libraries have words."""

import torch

# In the messages of RuntimeErrors: of libraries that take memory outside of torch's own, and of the CPU's.
WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "can't allocate memory",
)


def is_shortage(error: BaseException) -> bool:
    """Whether the same work may succeed in smaller pieces."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def give_back(device: torch.device) -> None:
    """Lets go of memory that torch keeps for later: what had too little may be a library beside it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
