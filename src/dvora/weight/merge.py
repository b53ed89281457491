"""Adding an adapter's update to a weight in the weight's dtype, and measuring what rounding loses."""

import copy
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..engines.tensor_parallel import check_whole
from ..ops.annotations import Float
from ..ops.dtypes import norm_dtype

SMALL_LOSS = 0.05
"""Merges that lose no more than this share of their update give no warning."""


class MergePrecisionWarning(UserWarning):
    """Rounding to the weight's dtype lost more than a small part of the update."""


class Merged(NamedTuple):
    """A merged weight in the base's dtype, and the share of the update that rounding changed (0 .. 1)."""

    weight: Tensor
    lost: float


@torch.no_grad()
def merge(weight: Float[Tensor, "O I"], delta: Float[Tensor, "O I"]) -> Merged:
    """`weight + delta` in the dtype of `weight`.

    Args:
        weight: W.
        delta: `W' - W` in float32 or float64.

    Returns:
        The rounded weight and `||rounded - exact|| / ||delta||` (Frobenius norms), zero for a zero delta.
    """
    exact = weight.to(delta.dtype) + delta
    rounded = exact.to(weight.dtype)
    size = torch.linalg.vector_norm(delta)
    lost = torch.linalg.vector_norm(rounded.to(delta.dtype) - exact) / torch.where(size > 0, size, 1.0)
    return Merged(rounded, float(lost))


def check_finite(merged: Tensor, what: str) -> None:
    """Check that a merged weight is finite.

    Args:
        merged: in the dtype that it will be stored in.
        what: the operation, for the message.

    Raises:
        ValueError: a value is not finite, or too large for the dtype.
    """
    # `isfinite` does not support eight bits.
    if not merged.to(norm_dtype(merged.dtype)).isfinite().all():
        raise ValueError(
            f"{what} gives values that are not finite or too large for {merged.dtype}; nothing was merged. A strength "
            "is too large, or training diverged: go back to an earlier checkpoint"
        )


def merged_copy(layer: nn.Linear, delta: Float[Tensor, "O I"], name: str) -> nn.Linear:
    """A copy of a layer with the merged weight.

    Args:
        layer: the base, which is not changed.
        delta: `W' - W`; the layer must have passed `check_can_be_set`.
        name: for messages.

    Raises:
        ValueError: the merged weight is not finite in the layer's dtype.
    """
    weight, lost = merge(layer.weight, delta)
    check_finite(weight, f"{name}: merging")
    warn_of_losses({name: lost}, weight.dtype)
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        merged.weight.copy_(weight)
    return merged


def check_can_be_set(layer: nn.Module, parameter_name: str, name: str) -> None:
    """Check that a merged weight can be assigned to a layer.

    Raises:
        TypeError: the weight is computed in every pass (a parametrization).
        ValueError: it is sharded over processes.
    """
    check_whole(layer._parameters.get(parameter_name), name)
    if parameter_name not in {**layer._parameters, **layer._buffers}:
        raise TypeError(
            f"{name} computes its weight in every pass (it is parametrized), so a merged weight cannot be set; remove "
            "the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
        )


def warn_of_losses(losses: dict[str, float], dtype: torch.dtype) -> None:
    """One warning for all layers whose merge lost more than a small part of their update.

    Args:
        losses: share lost, by layer name.
        dtype: of the merged weights.
    """
    large = {name: lost for name, lost in losses.items() if lost > SMALL_LOSS}
    if not large:
        return
    worst = max(large, key=lambda name: large[name])
    warnings.warn(
        f"merging into {dtype} changed more than {SMALL_LOSS:.0%} of the update in {len(large)} of {len(losses)} "
        f"layers, most in {worst}: {large[worst]:.1%}. The merged model is not the adapted model to that extent; "
        "keep the adapter unmerged, or merge into a float32 copy of the base.",
        MergePrecisionWarning,
        stacklevel=3,
    )
