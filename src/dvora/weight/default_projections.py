"""The process-wide default projections, for layers that are given none."""

import threading

from ..matrices.interface import SharedProjections
from ..method.validation import checked_rank

_lock = threading.Lock()
_default: SharedProjections | None = None


def initialize_shared_matrices(input_size: int, output_size: int, rank: int, seed: int | None = None) -> None:
    """Create the process-wide default `A` and `B`, used by every `DVoRAAdapter` that is given no `shared`.

    They grow as larger layers come; existing layers keep the matrices they were created with.

    Args:
        input_size: largest number of input features expected.
        output_size: largest number of output features expected.
        rank: largest rank expected.
        seed: names the matrices; None means 0.

    Raises:
        TypeError: a size or the seed is not an integer.
        ValueError: a size is not positive or the seed is out of range.
    """
    global _default
    for name, size in (("input_size", input_size), ("output_size", output_size)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be a positive integer, got {size!r} of type {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size}")
    made = SharedProjections(seed=0 if seed is None else seed)
    made.reserve(checked_rank(rank), input_size, output_size)
    with _lock:
        _default = made


def are_shared_matrices_initialized() -> bool:
    """Whether the process-wide default projections exist."""
    with _lock:
        return _default is not None


def reset_shared_matrices() -> None:
    """Forget the process-wide default projections; existing layers keep theirs."""
    global _default
    with _lock:
        _default = None


def default_projections(input_size: int, output_size: int, rank: int) -> SharedProjections:
    """The process-wide default, for a layer of the given size.

    Raises:
        ValueError: it was not initialized.
    """
    with _lock:
        if _default is None:
            raise ValueError(
                "the shared matrices are not initialized: call dvora.initialize_shared_matrices("
                f"input_size={input_size}, output_size={output_size}, rank={rank}) first, "
                "or pass shared=dvora.SharedProjections(seed=0)"
            )
        return _default
