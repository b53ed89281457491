"""DVoRA adapters: DoRA's magnitude and direction on VeRA's shared random matrices.

`import dvora` makes the method known to PEFT, whether PEFT is imported before or after it.
"""

from typing import TYPE_CHECKING, Any

from . import functional
from .adapter import DVoRAAdapter
from .merging import MergePrecisionWarning
from .peft_hook import register_with_peft
from .projections import SharedProjections
from .shared import are_shared_matrices_initialized, initialize_shared_matrices, reset_shared_matrices

if TYPE_CHECKING:
    from .tuner import DVoRAConfig, DVoRAModel, hotswap_adapter, merged

__version__ = "0.1.0.dev0"

__all__ = [
    "DVoRAAdapter",
    "DVoRAConfig",
    "DVoRAModel",
    "MergePrecisionWarning",
    "SharedProjections",
    "are_shared_matrices_initialized",
    "functional",
    "hotswap_adapter",
    "initialize_shared_matrices",
    "merged",
    "reset_shared_matrices",
]


def __getattr__(name: str) -> Any:
    """The PEFT method's names, imported with PEFT at their first use."""
    if name in ("DVoRAConfig", "DVoRAModel", "hotswap_adapter", "merged"):
        from . import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_with_peft()
