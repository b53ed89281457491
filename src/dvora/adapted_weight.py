"""One adapted weight without its trained vectors: projections, norm constants and hyperparameters.

The plain layer and the PEFT layer both own their vectors and leave everything else to this module, so that forward
pass, gain and merge are written once.

The norm constants belong to one state of the base weight. They are made again when the weight was replaced, written
to, cast or moved, and computed in every pass, with gradients, while the weight itself is trained.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import functional as F
from .functional import DIRECTIONS, Direction, NormConstants, Vectors
from .gradients import LinearGradients, dvora_linear_backward
from .precision import at_least_float32, full_precision, norm_dtype
from .projections import SharedProjections
from .shapes import Float

_SET_UP_VALUES = 2**24
"""Values of the weight that are held in float32 at a time while the constants are made."""


class _State(NamedTuple):
    """Equal states mean equal values, but for writes through `weight.data`, which PyTorch does not count."""

    storage: StorageWeakRef
    """Weak, so that it keeps no memory, but no other storage can come to have its identity."""
    address: int
    version: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, weight: Tensor) -> "_State":
        version = -1 if weight.is_inference() else weight._version
        storage = StorageWeakRef(weight.untyped_storage())
        return cls(storage, weight.data_ptr(), version, weight.dtype, weight.device)


class AdaptedWeight(nn.Module):
    """The frozen side of one adapted weight (O, I).

    Args:
        weight: the base's, as an (O, I) matrix.
        rank: R.
        shared: the frozen projections.
        alpha: the update is scaled by `alpha / rank`; None means `rank`.
        direction: what the update is added to, the "unit" rows or the "weight".
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3).
        name: of the layer, for error messages.

    Raises:
        TypeError: the weight is not a floating matrix or `rank` is not an integer.
        ValueError: the weight is on the meta device or not finite, or a hyperparameter is out of range.
    """

    w: Tensor
    coordinates: Tensor
    rest_squared: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "O I"],
        rank: int,
        *,
        shared: SharedProjections,
        alpha: float | None = None,
        direction: Direction = "unit",
        detach_norm: bool = False,
        name: str = "layer",
    ) -> None:
        super().__init__()
        check_weight(weight, name)
        self.out_features, self.in_features = weight.shape
        self.rank = checked_rank(rank)
        self.alpha = float(rank) if alpha is None else checked_alpha(alpha)
        self.scaling = self.alpha / self.rank
        self.direction = checked_direction(direction)
        self.detach_norm = detach_norm
        self.name = name
        self.shared = shared
        shared.reserve(rank, self.in_features, self.out_features)
        self._measured: _State | None = None
        for buffer in ("w", "coordinates", "rest_squared"):
            self.register_buffer(buffer, None, persistent=False)
        self.refresh(weight)

    def initial_vectors(self, d_initial: float) -> Vectors:
        """The starting values, with which the layer is its base: m = w, lambda_b = 0, lambda_d = `d_initial`."""
        with torch.inference_mode(False):
            return Vectors(self.w.clone(), torch.zeros_like(self.w), self.w.new_full((self.rank,), d_initial))

    def constants(self, weight: Float[Tensor, "O I"]) -> NormConstants:
        """The norm constants of the weight as it is now."""
        # A compiled graph cannot ask a weight for its version: it holds the constants of a frozen weight.
        compiling = torch.compiler.is_compiling()
        if weight.requires_grad and (torch.is_grad_enabled() or compiling):
            return self._measure(weight)
        if not compiling:
            self.follow(weight)
        return NormConstants(self.w, self.coordinates, self.rest_squared, self._factor(weight))

    def follow(self, weight: Float[Tensor, "O I"]) -> None:
        """Make the constants anew if the weight has changed since; on the meta device there is nothing to measure."""
        if not weight.is_meta and self._measured != _State.of(weight):
            self.refresh(weight)

    def refresh(self, weight: Float[Tensor, "O I"]) -> None:
        """Make the constants anew.

        Raises:
            ValueError: a row norm of the weight is not finite.
        """
        with torch.inference_mode(False), torch.no_grad():
            rows = max(1, _SET_UP_VALUES // max(1, self.in_features))
            parts = [self._measure(part) for part in weight.detach().split(rows)]
            w, self.coordinates, self.rest_squared = (torch.cat(part) for part in list(zip(*parts, strict=True))[:3])
            check_norms(w, self.name)
            self.w = w
        self._measured = _State.of(weight)

    def gain_minus_one(
        self, vectors: Vectors, weight: Float[Tensor, "O I"]
    ) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
        """`g - 1` and `beta` of every row."""
        constants = self.constants(weight)
        with full_precision(weight.device):
            beta = F.row_scale(vectors.lambda_b, constants.w, self.scaling, self.direction)
            return F.gain_minus_one(vectors, constants, self._B(constants.w), beta, self.detach_norm), beta

    def update(
        self, x: Float[Tensor, "*T I"], vectors: Vectors, weight: Float[Tensor, "O I"]
    ) -> tuple[Float[Tensor, "*T O"], Float[Tensor, "O"]]:
        """What `functional.combine` adds to the base's output: `g beta ((x A^T) lambda_d) B^T`, and `g - 1`."""
        g1, beta = self.gain_minus_one(vectors, weight)
        z = self.shared.project(x, self.rank)
        low_rank = self.shared.expand(z * vectors.lambda_d.to(z.dtype), self.out_features)
        return (1 + g1) * beta * low_rank, g1

    @torch.no_grad()
    def gradients(
        self,
        output_gradient: Float[Tensor, "*T O"],
        x: Float[Tensor, "*T I"],
        vectors: Vectors,
        weight: Float[Tensor, "O I"],
    ) -> LinearGradients:
        """The gradients of the whole layer in closed form; that of W only if it is trained."""
        constants = self.constants(weight)
        found = dvora_linear_backward(
            output_gradient.reshape(-1, self.out_features),
            x.reshape(-1, self.in_features),
            weight,
            self._A(constants.w),
            self._B(constants.w),
            vectors,
            constants,
            scaling=self.scaling,
            direction=self.direction,
            detach_norm=self.detach_norm,
            train_weight=weight.requires_grad,
        )
        return found._replace(x=found.x.reshape(x.shape))

    def delta(self, vectors: Vectors, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """`W' - W`, dense, in float32 or float64."""
        g1, beta = self.gain_minus_one(vectors, weight)
        with full_precision(weight.device):
            return F.rescaled_delta(weight, self._A(g1), self._B(g1), vectors.lambda_d, beta, g1)

    @torch.no_grad()
    def diagnostics(self, vectors: Vectors, weight: Float[Tensor, "O I"]) -> dict[str, float]:
        """How far the vectors have moved the weight: norm ratios n / w, angles in degrees, gains, rows at risk."""
        constants = self.constants(weight)
        with full_precision(weight.device):
            B = self._B(constants.w)
            beta = F.row_scale(vectors.lambda_b, constants.w, self.scaling, self.direction)
            _, s = F.relative_norm(constants, B, vectors.lambda_d, beta)
            angle = F.row_angle(constants, B, vectors.lambda_d, beta).rad2deg()
            g1 = F.gain_minus_one(vectors, constants, B, beta).abs()
        figures = {
            "norm_ratio_mean": s.mean(),
            "norm_ratio_max": s.max(),
            "angle_degrees_mean": angle.mean(),
            "angle_degrees_max": angle.max(),
            "gain_distance_mean": g1.mean(),
            "gain_distance_max": g1.max(),
            "near_cancellation_share": (s.square() < 1e-3).to(s.dtype).mean(),
            "zero_row_share": (constants.w == 0).to(s.dtype).mean(),
        }
        return {name: float(value) for name, value in figures.items()}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha:g}, direction={self.direction!r}, detach_norm={self.detach_norm}"
        )

    def _measure(self, weight: Float[Tensor, "O I"]) -> NormConstants:
        dtype = norm_dtype(weight.dtype)
        basis = self.shared.basis(self.rank, self.in_features, dtype).to(weight.device)
        with full_precision(weight.device):
            return F.norm_constants(weight, self._factor(weight), basis)

    def _factor(self, weight: Tensor) -> Float[Tensor, "R K"]:
        return self.shared.factor(self.rank, self.in_features, norm_dtype(weight.dtype)).to(weight.device)

    def _A(self, like: Tensor) -> Float[Tensor, "R I"]:
        return self.shared.A(self.rank, self.in_features, like.dtype).to(like.device)

    def _B(self, like: Tensor) -> Float[Tensor, "O R"]:
        return self.shared.B(self.rank, self.out_features, like.dtype).to(like.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedWeight":
        if recurse:
            self.shared._apply(fn)
        super()._apply(at_least_float32(fn), recurse=False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_measured": None}


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse a base weight that cannot be adapted, naming the layer.

    Raises:
        TypeError: not a floating matrix.
        ValueError: on the meta device.
    """
    if type(weight) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name}: the base weight is a {type(weight).__name__} (quantised, sharded or uninitialised); DVoRA adapts "
            "plain floating-point tensors"
        )
    if not weight.is_floating_point():
        raise TypeError(f"{name}: the base weight has dtype {weight.dtype}; DVoRA adapts floating-point weights")
    if weight.dim() != 2:
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


def checked_rank(rank: int) -> int:
    """The rank, if it is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be a positive integer, got {rank!r} of type {type(rank).__name__}")
    if rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank}")
    return rank


def checked_alpha(alpha: float) -> float:
    """alpha as a float, if it is finite and positive."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha must be a positive number or None (for alpha = rank), got {alpha!r}")
    if not (math.isfinite(alpha) and alpha > 0):
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
    if not math.isfinite(d_initial):
        raise ValueError(f"d_initial must be finite, got {d_initial}")
    return float(d_initial)
