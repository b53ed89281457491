"""DVoRA adapters: DoRA's magnitude and direction on VeRA's shared random matrices."""

from . import functional
from .adapter import DVoRAAdapter
from .projections import SharedProjections
from .shared import are_shared_matrices_initialized, initialize_shared_matrices, reset_shared_matrices

__version__ = "0.1.0.dev0"

__all__ = [
    "DVoRAAdapter",
    "SharedProjections",
    "are_shared_matrices_initialized",
    "functional",
    "initialize_shared_matrices",
    "reset_shared_matrices",
]
