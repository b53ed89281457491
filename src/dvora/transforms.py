"""Whether PyTorch is transforming the code that runs: then it must see every operation, and nothing may be kept."""

import torch
from torch.autograd import forward_ad


_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


def transforming() -> bool:
    """Whether the code is compiled, exported or traced, or runs under `torch.func` or forward-mode differentiation."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(torch._C._get_dispatch_mode(tracer) is not None for tracer in _TRACERS)
    )
