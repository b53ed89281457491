"""Checks of hyperparameters and of base weights, with messages that say what was expected."""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .functional import DIRECTIONS, Direction
from .shapes import Float

MAX_RANK = 2**16
"""Far beyond any use; a damaged setting must not make matrices of a rank that never ends."""


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse a base weight that cannot be adapted, naming the layer.

    Raises:
        TypeError: not a plain tensor of floating-point numbers of at least 16 bits.
        ValueError: on the meta device.
    """
    if type(weight) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name}: the base weight is a {type(weight).__name__} (quantised, sharded or uninitialised); DVoRA adapts "
            "plain floating-point tensors"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"{name}: the base weight has dtype {weight.dtype}; DVoRA adapts floating-point weights of 16 bits and more"
        )
    if weight.dim() < 2:
        raise TypeError(f"{name}: the base weight has shape {tuple(weight.shape)}; DVoRA adapts matrices")
    if weight.is_meta:
        raise ValueError(f"{name}: the base weight is on the meta device; load the base model's weights first")


def check_norms(w: Float[Tensor, "O"], name: str) -> None:
    """Refuse a base weight with a row norm that is not finite, naming the layer.

    Raises:
        ValueError: a norm is NaN or infinite.
    """
    if not w.isfinite().all():
        raise ValueError(
            f"{name}: {int((~w.isfinite()).sum())} of {len(w)} rows of the base weight have no finite norm "
            "(NaN, infinity or overflow); repair the base model before adapting it"
        )


def checked_norm_cache(norm_cache: object) -> Literal["auto"] | bool:
    """Whether constants of the size (out, rank) are kept, if it says so."""
    if norm_cache == "auto":
        return "auto"
    if isinstance(norm_cache, bool):
        return norm_cache
    raise ValueError(f'norm_cache must be "auto", True or False, got {norm_cache!r}')


def checked_rank(rank: int) -> int:
    """The rank, if it is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be a positive integer, got {rank!r} of type {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank}")
    if rank > MAX_RANK:
        raise ValueError(f"rank must be at most {MAX_RANK}, got {rank}")
    return rank


def fits_float32(value: float) -> bool:
    """Whether a number is finite in float32; `math.isfinite` fails for integers beyond a double."""
    limit = torch.finfo(torch.float32).max
    return bool(-limit <= value <= limit)


def rounds_to_zero(value: float) -> bool:
    """Whether a number is zero in float32."""
    return abs(value) <= torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps / 2


def checked_alpha(alpha: float) -> float:
    """alpha as a float, if it is finite and positive."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha must be a positive number or None (for alpha = rank), got {alpha!r}")
    if not (fits_float32(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and positive, or None (for alpha = rank), got {alpha}")
    return float(alpha)


def checked_direction(direction: str) -> Direction:
    """The direction, if it is known."""
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    return cast(Direction, direction)


def checked_d_initial(d_initial: float) -> float:
    """The starting value of lambda_d, if it is a finite number."""
    if isinstance(d_initial, bool) or not isinstance(d_initial, int | float):
        raise TypeError(f"d_initial must be a number, got {d_initial!r}")
    if not fits_float32(d_initial):
        raise ValueError(f"d_initial must be finite, got {d_initial}")
    return float(d_initial)


def checked_not_negative(value: float, argument: str) -> float:
    """A rate or a decay, if it is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{argument} must be finite and not negative, got {value}")
    return value


def checked_strength(strength: float) -> float:
    """The strength as a float, if it is finite."""
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise TypeError(f"strength must be a number, got {strength!r}")
    if not fits_float32(strength):
        raise ValueError(f"strength must be finite, with 0 for the base and 1 for the adapter itself, got {strength}")
    return float(strength)
