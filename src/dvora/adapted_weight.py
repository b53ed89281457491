"""One adapted weight without its trained vectors: projections, norm constants and hyperparameters.

The plain layer and the PEFT layers own their vectors and leave everything else to this module, so that forward pass,
gain and merge are written once, for every way of storing a weight.

The norm constants belong to one state of the base weight. They are made again when the weight was replaced, written
to, cast or moved, and computed in every pass, with gradients, while the weight itself is trained.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import functional as F
from .functional import Direction, NormConstants, Vectors
from .gradients import LinearGradients, dvora_linear_backward
from .layouts import ROWS, Layout
from .precision import at_least_float32, full_precision, norm_dtype
from .projections import SharedProjections, decompose
from .shapes import Float
from .validation import check_norms, check_weight, checked_alpha, checked_direction, checked_rank

MAGNITUDE_ONLY = 0
"""The rank of a weight whose rows are rescaled and nothing else."""

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
    """The frozen side of one adapted weight.

    Methods take the weight as the layer stores it, or None where nothing but the constants is at hand: a quantised
    layer keeps no such tensor.

    Args:
        weight: the base's, as stored.
        rank: R, or `MAGNITUDE_ONLY`.
        shared: the frozen projections.
        alpha: the update is scaled by `alpha / rank`; None means `rank`.
        direction: what the update is added to, the "unit" rows or the "weight".
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3).
        layout: how the weight is stored.
        skipped_column: a column of the weight's matrix that the update leaves alone: the padding entry of a table.
        name: of the layer, for error messages.

    Raises:
        TypeError: the weight is not floating or `rank` is not an integer.
        ValueError: the weight is on the meta device or not finite, or a hyperparameter is out of range.
    """

    w: Tensor
    coordinates: Tensor
    rest_squared: Tensor
    own_factor: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        *,
        shared: SharedProjections,
        alpha: float | None = None,
        direction: Direction = "unit",
        detach_norm: bool = False,
        layout: Layout = ROWS,
        skipped_column: int | None = None,
        name: str = "layer",
    ) -> None:
        super().__init__()
        check_weight(weight, name)
        self.layout = layout
        self.out_features, self.in_features = layout.matrix(weight).shape
        self.rank = rank if rank == MAGNITUDE_ONLY else checked_rank(rank)
        self.alpha = float(rank) if alpha is None else checked_alpha(alpha)
        self.scaling = self.alpha / self.rank if self.rank else 0.0
        self.direction = checked_direction(direction)
        self.detach_norm = detach_norm
        self.skipped_column = skipped_column
        self.name = name
        # A name that no model has: PEFT finds modules to save by the ends of their names.
        self.dvora_projections = shared
        if self.rank:
            shared.reserve(rank, self.in_features, self.out_features)
        self._measured: _State | None = None
        for buffer in ("w", "coordinates", "rest_squared", "own_factor"):
            self.register_buffer(buffer, None, persistent=False)
        self.refresh(weight)

    @property
    def shared(self) -> SharedProjections:
        """The frozen projections."""
        return self.dvora_projections

    def initial_vectors(self, d_initial: float) -> Vectors:
        """The starting values, with which the layer is its base: m = w, lambda_b = 0, lambda_d = `d_initial`."""
        with torch.inference_mode(False):
            return Vectors(self.w.clone(), torch.zeros_like(self.w), self.w.new_full((self.rank,), float(d_initial)))

    def constants(self, weight: Tensor | None) -> NormConstants:
        """The norm constants of the weight as it is now."""
        # A compiled graph cannot ask a weight for its version: it holds the constants of a frozen weight.
        compiling = torch.compiler.is_compiling()
        if weight is not None:
            if weight.requires_grad and (torch.is_grad_enabled() or compiling):
                return self._measure(self.layout.matrix(weight))
            if not compiling:
                self.follow(weight)
        return NormConstants(self.w, self.coordinates, self.rest_squared, self._factor())

    def follow(self, weight: Tensor) -> None:
        """Make the constants anew if the weight has changed since; on the meta device there is nothing to measure."""
        if not weight.is_meta and self._measured != _State.of(weight):
            self.refresh(weight)

    def refresh(self, weight: Tensor) -> None:
        """Make the constants anew.

        Raises:
            ValueError: a row norm of the weight is not finite.
        """
        with torch.inference_mode(False), torch.no_grad():
            matrix = self.layout.matrix(weight.detach())
            rows = max(1, _SET_UP_VALUES // max(1, self.in_features))
            parts = [self._measure(part) for part in matrix.split(rows)]
            w, self.coordinates, self.rest_squared = (torch.cat(part) for part in list(zip(*parts, strict=True))[:3])
            if not self.rank or self.skipped_column is not None:
                self.own_factor = parts[0].factor
            check_norms(w, self.name)
            self.w = w
        self._measured = _State.of(weight)

    def A(self, like: Tensor) -> Float[Tensor, "R I"]:
        """The dense A of this weight, with the dtype and device of `like`."""
        if not self.rank:
            return like.new_empty(0, self.in_features)
        A = self.shared.A(self.rank, self.in_features, like.dtype).to(like.device)
        if self.skipped_column is None:
            return A
        return A.index_fill(1, torch.tensor([self.skipped_column], device=A.device), 0.0)

    def B(self, like: Tensor) -> Float[Tensor, "O R"]:
        """The dense B of this weight, with the dtype and device of `like`."""
        if not self.rank:
            return like.new_empty(self.out_features, 0)
        return self.shared.B(self.rank, self.out_features, like.dtype).to(like.device)

    def gain_minus_one(self, vectors: Vectors, weight: Tensor | None) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
        """`g - 1` and `beta` of every row."""
        constants = self.constants(weight)
        with full_precision(constants.w.device):
            beta = F.row_scale(vectors.lambda_b, constants.w, self.scaling, self.direction)
            return F.gain_minus_one(vectors, constants, self.B(constants.w), beta, self.detach_norm), beta

    def low_rank(self, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "*T O"]:
        """`((x A^T) lambda_d) B^T`, in the dtype of `x`."""
        z = self.shared.project(x, self.rank)
        return self.shared.expand(z * lambda_d.to(z.dtype), self.out_features)

    def update(
        self, low_rank: Float[Tensor, "*T O"], vectors: Vectors, weight: Tensor | None, strength: float | Tensor = 1.0
    ) -> tuple[Float[Tensor, "*T O"], Float[Tensor, "O"]]:
        """What `functional.combine` adds to the base's output: `g beta` times the low-rank product, and `g - 1`.

        Args:
            low_rank: the inputs through A, lambda_d and B.
            vectors: the trained ones.
            weight: as stored, or None.
            strength: s of `W + s (W' - W)`.
        """
        g1, beta = self.gain_minus_one(vectors, weight)
        return (strength * (1 + g1) * beta) * low_rank, strength * g1

    @torch.no_grad()
    def gradients(
        self, output_gradient: Float[Tensor, "*T O"], x: Float[Tensor, "*T I"], vectors: Vectors, weight: Tensor
    ) -> LinearGradients:
        """The gradients of the whole layer in closed form; that of W only if it is trained."""
        constants = self.constants(weight)
        found = dvora_linear_backward(
            output_gradient.reshape(-1, self.out_features),
            x.reshape(-1, self.in_features),
            self.layout.matrix(weight),
            self.A(constants.w),
            self.B(constants.w),
            vectors,
            constants,
            scaling=self.scaling,
            direction=self.direction,
            detach_norm=self.detach_norm,
            train_weight=weight.requires_grad,
        )
        return found._replace(x=found.x.reshape(x.shape))

    def delta(self, vectors: Vectors, weight: Tensor) -> Float[Tensor, "O I"]:
        """`W' - W` as a dense matrix, in float32 or float64."""
        g1, beta = self.gain_minus_one(vectors, weight)
        with full_precision(g1.device):
            matrix = self.layout.matrix(weight)
            return F.rescaled_delta(matrix, self.A(g1), self.B(g1), vectors.lambda_d, beta, g1)

    @torch.no_grad()
    def diagnostics(self, vectors: Vectors, weight: Tensor | None) -> dict[str, float]:
        """How far the vectors have moved the weight: norm ratios n / w, angles in degrees, gains, rows at risk."""
        constants = self.constants(weight)
        with full_precision(constants.w.device):
            B = self.B(constants.w)
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

    def _measure(self, matrix: Float[Tensor, "O I"]) -> NormConstants:
        factor, basis = self._decomposed(norm_dtype(matrix.dtype), matrix.device)
        with full_precision(matrix.device):
            return F.norm_constants(matrix, factor, basis)

    def _decomposed(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[Float[Tensor, "R K"], Float[Tensor, "K I"]]:
        """`L` and `Q` of `A = L Q`, shared by all weights of this width unless a column is left out."""
        if self.rank and self.skipped_column is None:
            factor = self.shared.factor(self.rank, self.in_features, dtype)
            basis = self.shared.basis(self.rank, self.in_features, dtype)
        elif self.rank:
            factor, basis = decompose(self.A(torch.empty(0, dtype=torch.float64)))
        else:
            factor, basis = torch.empty(0, 0), torch.empty(0, self.in_features)
        return factor.to(device, dtype), basis.to(device, dtype)

    def _factor(self) -> Float[Tensor, "R K"]:
        if self.own_factor is not None:
            return self.own_factor
        return self.shared.factor(self.rank, self.in_features, self.w.dtype).to(self.w.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedWeight":
        if recurse:
            self.shared._apply(fn)
        super()._apply(at_least_float32(fn), recurse=False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_measured": None}
