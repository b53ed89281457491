"""Counts the operations of a step and the bytes that its kernels read and write, to hold measured times against.

A kernel reads every tensor that it is given and writes every tensor that it returns, whatever the caches hold. Two
numbers then tell a step's time in units of the frozen base's (`metrics.expected_ratio`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.kernel_count import launches


class Traffic(NamedTuple):
    """What one step does."""

    operations: int
    """Multiplications and additions of matrix products and attention."""
    bytes: int
    """Read and written by all kernels."""


def traffic(step: Callable[[], object]) -> Traffic:
    """What a call does, its backward pass with it.

    Args:
        step: called once.
    """
    counting = _Counting()
    with counting:
        step()
    return Traffic(counting.operations, counting.bytes)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if launches(func):
            read = [args, *(value for name, value in kwargs.items() if name != "out")]
            self.bytes += sum(map(_bytes, tree_leaves(read))) + sum(map(_bytes, tree_leaves(found)))
        of_products = flop_registry.get(func._overloadpacket)
        if of_products is not None:
            self.operations += of_products(*args, **kwargs, out_val=found)
        return found


def _bytes(value: object) -> int:
    """Of a tensor; what is expanded is in memory once."""
    if not isinstance(value, Tensor):
        return 0
    sizes = zip(value.shape, value.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * value.itemsize
