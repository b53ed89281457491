"""Whether PyTorch traces the running code or records it for a backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def is_traced() -> bool:
    """Whether the code is compiled, exported or traced, or runs under `torch.func` or forward-mode differentiation.

    PyTorch must then see every operation, and nothing may be cached from one pass to the next.
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


def runs_plainly() -> bool:
    """Whether operations are neither traced nor recorded, and autocast chooses no dtypes, on any device."""
    return not (is_traced() or grad_recorded() or torch._C._is_any_autocast_enabled())


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient is a batch of several (`is_grads_batched`), for which nothing may be written in place."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def saved_tensors_are_hooked() -> bool:
    """Whether hooks take what autograd saves, as checkpointing that is not reentrant and offloading do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def in_backward_pass() -> bool:
    """Whether this thread runs a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def saving_intercepted() -> bool:
    """Whether surrounding code manages what is saved for a backward pass, or no backward pass will come.

    Checkpointing and offloading intercept what autograd saves; an autograd function (reentrant checkpointing) runs its
    forward pass unrecorded; both may run it again during a backward pass. In inference mode nothing is saved.
    """
    if grad_recorded():
        return saved_tensors_are_hooked() or in_backward_pass()
    # An autograd function and inference mode switch forward-mode differentiation off; no_grad does not.
    return not torch._C._is_fwd_grad_enabled()


def version_of(tensor: Tensor) -> int:
    """PyTorch's version counter; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def gradients_of(
    outputs: Tensor, inputs: Sequence[Tensor | None], grad_outputs: Tensor, create_graph: bool
) -> list[Tensor | None]:
    """The gradients of outputs with respect to those inputs that are there and require one; None for others."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    if not (wanted and outputs.requires_grad):
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=create_graph, allow_unused=True))
    return [None if tensor is None or not tensor.requires_grad else next(found) for tensor in inputs]
