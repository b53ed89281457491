"""Whether PyTorch is transforming the code that runs: then it must see every operation, and nothing may be kept."""

import torch
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether the code is compiled or exported, or runs under `torch.func` or forward-mode differentiation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
