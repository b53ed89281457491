"""Checks of hyperparameters, base weights and state dicts, with messages that say what was expected."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .functional import DIRECTIONS, Direction, Vectors, row_norm
from .tensors import Float

MAX_RANK = 2**16
"""Far above any use, so that a damaged setting cannot allocate without end."""
LARGEST = torch.finfo(torch.float32).max
FAR = 1e12
"""Vectors with larger values may give factors that are not finite: only training that diverged makes them."""


def check_weight(weight: Tensor, name: str) -> None:
    """Check that a base weight can be adapted.

    Raises:
        TypeError: not a plain tensor of floating-point numbers of at least 16 bits.
        ValueError: on the meta device, or without any values.
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
    if not weight.numel():
        raise ValueError(
            f"{name}: the base weight has shape {tuple(weight.shape)}: there is nothing to adapt; leave the layer out"
        )


def checked_vectors(
    state_dict: Mapping[str, Any], prefix: str, parameters: Iterable[tuple[str, Tensor]], layer: str
) -> dict[str, Tensor]:
    """The trained vectors in a layer's state dict, in the parameters' dtype, if the whole state dict can be loaded.

    Args:
        state_dict: with some or all of the layer's parameters.
        prefix: of the layer's keys in it.
        parameters: the layer's, by name.
        layer: a description for messages.

    Raises:
        TypeError: a value is no tensor.
        ValueError: a shape differs from its parameter's, a vector is not finite in its dtype, or a row of the base
            weight has no finite norm.
    """
    vectors = {}
    for name, own in parameters:
        loaded = state_dict.get(prefix + name)
        if loaded is None:
            continue
        if not isinstance(loaded, Tensor):
            raise TypeError(f"{prefix}{name} is a {type(loaded).__name__} in the state dict, expected a tensor")
        if loaded.shape != own.shape:
            raise ValueError(
                f"{prefix}{name} has shape {tuple(loaded.shape)} in the state dict, {tuple(own.shape)} in the layer "
                f"({layer}); sizes and rank cannot be changed by loading"
            )
        value = loaded.detach().to(own.dtype)
        if name in Vectors._fields:
            if not value.is_meta and not value.isfinite().all():
                raise ValueError(f"{prefix}{name} has values that are not finite in {own.dtype} in the state dict")
            if not value.is_meta and value.numel() and value.abs().max() > FAR:
                raise ValueError(
                    f"{prefix}{name} has values up to {float(value.abs().max()):.3g} in the state dict, with which "
                    f"outputs might not be finite (above {FAR:g}); training diverged: go back to an earlier checkpoint"
                )
            vectors[prefix + name] = value
        elif name == "base_layer.weight" and type(value) is Tensor and not value.is_meta:
            check_norms(row_norm(value), prefix + name)
    return vectors


def computes_as(layer: nn.Module, layer_type: type[nn.Module]) -> bool:
    """Whether a layer's forward is that of `layer_type`, possibly behind wrappers that set `__wrapped__`."""
    forward = inspect.unwrap(layer.forward)
    return inspect.ismethod(forward) and forward.__func__ is layer_type.forward


def check_linear(layer: nn.Module) -> None:
    """Check that a base layer is an `nn.Linear` with the forward of one.

    Raises:
        TypeError: it is not.
    """
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"base_layer of type {kind} is not supported; supported: torch.nn.Linear")
    if not computes_as(layer, nn.Linear):
        raise TypeError(
            f"base_layer of type {kind} is not supported: its forward is not that of torch.nn.Linear, so a merged "
            "layer would compute something else than the adapter. Adapt it through PEFT (dvora.DVoRAConfig), which "
            "measures such a layer by its forward"
        )


def check_bias(bias: Float[Tensor, "O"] | None, name: str) -> None:
    """Check that a bias is finite, since it is subtracted from outputs.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if bias is not None and not bias.is_meta and not bias.isfinite().all():
        raise ValueError(
            f"{name}: {int((~bias.isfinite()).sum())} of {bias.numel()} values of the bias are not finite; rows are "
            "rescaled without their bias, which is impossible then. Use a finite value, or leave the layer out"
        )


def check_norms(w: Float[Tensor, "O"], name: str) -> None:
    """Check that all row norms of a base weight are finite.

    Raises:
        ValueError: a norm is NaN or infinite.
    """
    if not w.isfinite().all():
        raise ValueError(
            f"{name}: {int((~w.isfinite()).sum())} of {len(w)} rows of the base weight have no finite norm "
            "(NaN, infinity or overflow); repair the base model before adapting it"
        )


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
    """Whether a number is finite in float32; `math.isfinite` raises for integers beyond a double."""
    return bool(-LARGEST <= value <= LARGEST)


def rounds_to_zero(value: float) -> bool:
    """Whether a number is zero in float32."""
    return abs(value) <= torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps / 2


def checked_groups(groups: int, columns: int | None = None, name: str = "") -> int:
    """The number of groups of columns with a lambda_d of their own, if a layer with so many inputs can have them."""
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"lambda_d_groups must be an integer, got {groups!r} of type {type(groups).__name__}")
    if groups < 1:
        raise ValueError(f"lambda_d_groups must be at least 1, got {groups}")
    if columns is not None and groups > columns:
        raise ValueError(
            f"{name}: lambda_d_groups={groups} cuts the columns of the weight, of which it has {columns}; use fewer "
            "groups, or leave the layer out"
        )
    return groups


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


def checked_real(tensor: Tensor, argument: str) -> Tensor:
    """The argument, if it is a tensor of real numbers."""
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        raise TypeError(f"{argument} must be a tensor of real numbers, got {tensor!r} of type {type(tensor).__name__}")
    return tensor


def checked_values(vector: Float[Tensor, "N"], parameters: Sequence[Tensor]) -> list[Tensor]:
    """One vector split into values for parameters, in their order, shapes and dtypes.

    Raises:
        TypeError: it is not a tensor of real numbers.
        ValueError: its size does not fit, or a value is not finite in its parameter's dtype.
    """
    sizes = [parameter.numel() for parameter in parameters]
    if checked_real(vector, "parameters").shape != (sum(sizes),):
        raise ValueError(f"parameters must have shape ({sum(sizes)},) for this layer, got {tuple(vector.shape)}")
    values = [v.reshape(p.shape).to(p) for v, p in zip(vector.split(sizes), parameters, strict=True)]
    for value in values:
        if not value.isfinite().all():
            raise ValueError(f"parameters must be finite in {value.dtype}, got NaN or infinity")
    return values


def checked_not_negative(value: float, argument: str) -> float:
    """A learning rate or weight decay, if it is finite and not negative."""
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
