"""FSDP2: which modules it has wrapped, and which tensors it may have gathered.

It gathers parameters for each pass without counting versions, so a version proves nothing there.
"""

import sys
from weakref import WeakValueDictionary

from torch import Tensor, nn

_never_gathered: "WeakValueDictionary[int, Tensor]" = WeakValueDictionary()


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether a module is wrapped by FSDP2, which gathers its parameters for each pass."""
    fsdp_module = _fsdp_module()
    return fsdp_module is not None and isinstance(module, fsdp_module)


def note_never_gathered(tensor: Tensor) -> None:
    """Record that FSDP2 has not made this tensor: it replaces the parameters that it gathers by tensors of its own."""
    _never_gathered[id(tensor)] = tensor


def may_be_gathered(tensor: Tensor) -> bool:
    """Whether FSDP2 may have made the tensor: `fully_shard` derives a class from the type of every module it wraps."""
    fsdp_module = _fsdp_module()
    if fsdp_module is None or not fsdp_module.__subclasses__():
        return False
    return _never_gathered.get(id(tensor)) is not tensor


def _fsdp_module() -> type | None:
    """FSDP2's class of wrapped modules; None where its module was never imported, which takes seconds."""
    found: type | None = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return found
