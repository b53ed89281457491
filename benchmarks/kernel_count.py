"""Counts the kernels of a computation: what starting them costs does not shrink with the tensors.

Counted is every operation that PyTorch runs, forward or backward, as one kernel, but for those that only look at a
tensor in another way or reserve memory. That is exact for most; some operations start several kernels on a GPU (a long
sum, a concatenation of many tensors). What is started past PyTorch's dispatcher is not seen, nor is what a compiled
model runs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_NOTHING_TO_LAUNCH = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
        # Views and changes of a tensor's own shape whose signatures do not say so.
        *("_unsafe_view", "_reshape_alias", "resize_", "set_", "detach_", "as_strided_"),
        *("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"),
    }
)


def kernels(step: Callable[[], object]) -> Counter[str]:
    """How often a call runs each operation that launches a kernel; `total()` is the number of kernels.

    Args:
        step: called once; its backward pass, if it has one, is counted with it.
    """
    counting = _Counting()
    with counting:
        step()
    return counting.found


def launches(operation: OpOverload) -> bool:
    """Whether an operation starts a kernel: whether its result is neither a view of an argument nor fresh memory."""
    schema = operation._schema
    if schema.name.partition("::")[2] in _NOTHING_TO_LAUNCH:
        return False
    return not any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if launches(func):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))
