"""DVoRA adapters: DoRA's magnitude and direction on VeRA's shared random matrices.

`import dvora` makes the method known to PEFT, whether PEFT is imported before or after it. It takes no time: what it
names is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import how_to_install, missing
from .peft_hook import register_with_peft

if TYPE_CHECKING:
    from . import flat, functional, sync
    from .adapter import (
        DVoRAAdapter,
        are_shared_matrices_initialized,
        initialize_shared_matrices,
        reset_shared_matrices,
    )
    from .bank.bank import AdapterBank
    from .matrices.interface import SharedProjections
    from .peft import DVoRAConfig, DVoRAModel, hotswap_adapter, merged
    from .weight import MergePrecisionWarning

__version__ = "0.1.0"

_HOMES = {
    "AdapterBank": "bank.bank",
    "DVoRAAdapter": "adapter",
    "DVoRAConfig": "peft",
    "DVoRAModel": "peft",
    "MergePrecisionWarning": "weight",
    "SharedProjections": "matrices.interface",
    "are_shared_matrices_initialized": "adapter",
    "hotswap_adapter": "peft",
    "initialize_shared_matrices": "adapter",
    "merged": "peft",
    "reset_shared_matrices": "adapter",
}
"""Where each name is."""
_MODULES = ("flat", "functional", "sync")

__all__ = [
    "AdapterBank",
    "DVoRAAdapter",
    "DVoRAConfig",
    "DVoRAModel",
    "MergePrecisionWarning",
    "SharedProjections",
    "are_shared_matrices_initialized",
    "flat",
    "functional",
    "hotswap_adapter",
    "initialize_shared_matrices",
    "merged",
    "reset_shared_matrices",
    "sync",
]


def __getattr__(name: str) -> Any:
    """A public name at its first use."""
    if name in _HOMES or name in _MODULES:
        try:
            home = import_module(f"{__name__}.{_HOMES.get(name, name)}")
        except ImportError as error:
            reason = missing(error) or f"{error}; {how_to_install('peft')}"
            raise ImportError(f"dvora.{name} is not available: {reason}") from error
        found = globals()[name] = home if name in _MODULES else getattr(home, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_peft()
