"""What PyTorch is doing with the code that runs: transforming it, recording it for a backward pass, or neither."""

import torch
from torch.autograd import forward_ad

_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def is_traced() -> bool:
    """Whether the code is compiled, exported or traced, or runs under `torch.func` or forward-mode differentiation.

    Then PyTorch must see every operation, and nothing may be kept from one pass to another.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(_PROXY) is not None
        or torch._C._get_dispatch_mode(_FAKE) is not None
    )


def grad_recorded() -> bool:
    """Whether operations are recorded for a backward pass."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def saving_intercepted() -> bool:
    """Whether something around the code decides what is kept for a backward pass, or none is to come.

    Checkpointing and offloading take what autograd saves, an autograd function (checkpointing of the older kind) runs
    its forward pass unrecorded, and both may run it again within a backward pass. In inference mode nothing is kept.
    """
    if grad_recorded():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return hooks is not None or torch._C._current_graph_task_id() != -1
    # Within both, but not in no_grad, forward-mode differentiation is off.
    return not torch._C._is_fwd_grad_enabled()
