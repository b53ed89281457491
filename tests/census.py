"""Census: everything that is still held of the memory that PyTorch handed out, wherever it is held.

Saved for a backward pass, in an attribute, a closure, a cache or another thread's variables: no holder is hidden.
"""

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Census(TorchDispatchMode):
    """Watches what is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        # Weak references: their storages go, but no other one can come to have their identity.
        self._made: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}
        self._given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given.setdefault(storage._cdata, StorageWeakRef(storage))
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._given:
                self._made.setdefault(storage._cdata, StorageWeakRef(storage))
                self._sizes[storage._cdata] = storage.nbytes()
        return result

    def largest(self) -> int:
        """The size in bytes of the largest storage that was made, held or not."""
        return max(self._sizes.values(), default=0)

    def held(self, anyway: Iterable[Tensor] = ()) -> list[int]:
        """The sizes in bytes of the storages that somebody holds.

        Args:
            anyway: tensors that do not count.
        """
        known = {tensor.untyped_storage()._cdata for tensor in anyway}
        return [self._sizes[k] for k, storage in self._made.items() if k not in known and not storage.expired()]


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tree_leaves(tree) if isinstance(tensor, Tensor)]


@contextmanager
def little_more_memory() -> Iterator[None]:
    """Within it, this process may grow by 400 MB, whoever allocates: torch, too, fails beyond."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 10**8, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
