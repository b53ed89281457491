"""The frozen side of one adapted weight: how it is stored, its row norms and norm constants, and merging into it.

The constants belong to one version of the base weight. They are computed again after the weight was replaced, written
to, cast or moved; while the weight is trained, they are computed in every pass, with gradients.

Dimensions: O out, I in, R rank, K values of lambda_d (R, or G R in G groups of columns), E experts, N adapters.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vecdot

from . import functional as F
from .checks import check_norms, check_weight, checked_alpha, checked_direction, checked_groups, checked_rank
from .engines import TensorParallelShard, check_whole, shard_of
from .functional import Direction, Vectors
from .matrices.groups import Groups
from .matrices.interface import Matrices, SharedProjections
from .tensors import (
    Float,
    TensorVersion,
    as_dtype,
    at_least_float32,
    full_precision,
    full_tensor,
    gathers_uncounted,
    is_dtensor,
    is_in_memory,
    is_traced,
    local,
    norm_dtype,
    times_apart,
)

MAGNITUDE_ONLY = 0
"""The rank of a weight that gets a magnitude and no update."""
SMALL_LOSS = 0.05
"""Merges that lose no more than this share of their update give no warning."""
_CHUNK_VALUES = 2**22
"""Values of a weight that are widened at a time."""
_AT_ONCE = 2**24
"""Values of products by groups that are made at a time, of several adapters."""
_SURE_NORM = 1e-15
"""Below this norm, squares of a row's values may underflow in float32."""


class WeightLayout(NamedTuple):
    """The conversion between a stored weight and its matrix (O, I)."""

    matrix: Callable[[Tensor], Tensor]
    """The matrix of a stored weight; a view where strides allow one."""
    stored: Callable[[Tensor, torch.Size], Tensor]
    """The stored weight, of the given shape, from a matrix."""


def _same(weight: Tensor) -> Tensor:
    return weight


def _same_back(matrix: Tensor, _: torch.Size) -> Tensor:
    return matrix


def _transposed(weight: Tensor) -> Tensor:
    return weight.T


def _transposed_back(matrix: Tensor, _: torch.Size) -> Tensor:
    return matrix.T


def _kernels(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _viewed_back(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix.reshape(shape)


def _experts(weight: Tensor) -> Tensor:
    return weight.flatten(0, 1)


def _experts_transposed(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).flatten(0, 1)


def _experts_transposed_back(matrix: Tensor, shape: torch.Size) -> Tensor:
    experts, in_features, out_features = shape
    return matrix.reshape(experts, out_features, in_features).transpose(1, 2)


# Functions with names, since lambdas cannot be pickled with a model.
ROWS = WeightLayout(_same, _same_back)
"""(O, I), as in `nn.Linear`."""
COLUMNS = WeightLayout(_transposed, _transposed_back)
"""(I, O), as in transformers' `Conv1D`; an embedding table too, whose out features are its columns."""
KERNELS = WeightLayout(_kernels, _viewed_back)
"""(O, in / groups, *kernel) of a convolution: I = in / groups * kernel elements."""
EXPERTS = WeightLayout(_experts, _viewed_back)
"""(E, O, I): every expert brings out features of its own."""
EXPERTS_TRANSPOSED = WeightLayout(_experts_transposed, _experts_transposed_back)
"""(E, I, O)."""


class RowConstants(NamedTuple):
    """What closed forms need of the rows of a weight."""

    w: Float[Tensor, "O"]
    """Row norms; one for zero rows."""
    unit: Float[Tensor, "O"]
    """kappa of a lambda_b of one."""
    one: Float[Tensor, ""]
    zero_rows: Tensor | None
    """Which rows are zero; None: none."""
    zero_scale: Float[Tensor, "O"] | None
    """Scale of a lambda_b of one in zero rows, where those get the update too (direction "weight"); else None."""


class AdaptedWeight(nn.Module):
    """The frozen side of one adapted weight.

    Methods take the weight as the layer stores it, or None where only the constants are in memory (a quantised layer).
    `w` (O,) are its row norms, `C` (O, R) is `B * (W / w A^T)`. With lambda_d by groups it has a value for each group,
    (O, K), and is kept only where it is small beside the weight, or the weight cannot be read in every pass; elsewhere
    `cross` is a product with the weight, of as many rows as the rank.

    Args:
        weight: the base's, as stored.
        rank: R, or `MAGNITUDE_ONLY`.
        shared: the frozen projections.
        alpha: the update is scaled by `alpha / rank`; None means `rank`.
        direction: the update is added to the "unit" rows of the weight or to the "weight" itself (DoRA).
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3).
        layout: how the weight is stored.
        groups: G, into which the columns are cut, each with a lambda_d of its own.
        padding_column: a column of the weight's matrix that the update does not change: an embedding's padding entry.
        readable: whether the weight can be read in every pass; that of a quantised layer cannot.
        name: of the layer, for error messages.

    Raises:
        TypeError: the weight is not floating or `rank` is not an integer.
        ValueError: the weight is on the meta device or not finite, or a hyperparameter is out of range.
    """

    w: Tensor
    C: Tensor
    matrices: Matrices
    """A and B for this process's shard of the weight."""

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        *,
        shared: SharedProjections,
        alpha: float | None = None,
        direction: Direction = "unit",
        detach_norm: bool = False,
        layout: WeightLayout = ROWS,
        groups: int = 1,
        padding_column: int | None = None,
        readable: bool = True,
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
        self.padding_column = padding_column
        self.readable = readable
        self.groups = checked_groups(groups, self.in_features, name) if groups != 1 and self.rank else 1
        self.by_groups = Groups(self.groups, self.in_features) if self.groups > 1 else None
        self.lambda_d_size = self.groups * self.rank
        self.name = name
        # A name that no model uses, since PEFT finds modules to save by the ends of their names.
        self.dvora_projections = shared
        self.update_key = shared.seed, shared.distribution, self.rank, self.groups
        """Adapters of equal keys have the same A, B and groups in a layer."""
        if self.rank:
            shared.impl.reserve(rank, self.in_features, self.out_features, norm_dtype(weight.dtype))
        self.shard: TensorParallelShard | None = None
        """The shard on this process, of a weight that is a DTensor."""
        self.has_zero_rows = True
        self.reads_weight = False
        """Whether `cross` is computed from the weight in every pass."""
        self.kept: tuple[object, Any, list[Tensor]] | None = None
        """Of the last evaluation: what its row factors belong to, they themselves, and their vectors (`factors`)."""
        self._row_constants: RowConstants | None = None
        self.weight_version: TensorVersion | None = None
        """The state of the weight that the constants belong to; None: compute them again."""
        self._sample: Tensor | None = None
        """Of the weight's values, where FSDP2 gathers them into other memory in every pass."""
        self._weight: weakref.ref[Tensor] | None = None
        self.register_buffer("w", None, persistent=False)
        self.register_buffer("C", None, persistent=False)
        self.refresh(weight)

    @property
    def shared(self) -> SharedProjections:
        """The frozen projections."""
        return self.dvora_projections

    def initial_vectors(self, d_initial: float) -> Vectors:
        """The starting values, for which the layer equals its base: m = w, lambda_b = 0, lambda_d = `d_initial`."""
        with torch.inference_mode(False):
            shape = (self.rank,) if self.by_groups is None else (self.groups, self.rank)
            return Vectors(self.w.clone(), torch.zeros_like(self.w), self.w.new_full(shape, float(d_initial)))

    def local(self, vectors: Vectors, weight: Tensor | None) -> Vectors:
        """The vectors for this process's shard of the weight; all of them, if the weight is not sharded.

        Raises:
            ValueError: the weight is sharded in a way that is not supported, or trained.
        """
        if weight is None or not is_dtensor(weight):
            return vectors
        if weight.requires_grad:
            raise ValueError(f"{self.name}: a base weight that is sharded over processes cannot be trained; freeze it")
        self.refresh_if_stale(weight)
        return vectors if self.shard is None else self.shard.vectors(vectors)

    def follow(self, weight: Tensor | None) -> bool:
        """Compute the constants again if the weight has changed.

        Args:
            weight: as stored, or None where only the constants are in memory.

        Returns:
            Whether factors are computed by the definition now: PyTorch must see every operation, or differentiate with
            respect to the weight, or has sharded it.
        """
        if torch.compiler.is_compiling() or self.shard is not None:
            return True
        if is_traced():
            if weight is not None and not self.is_trained(weight):
                self.refresh_if_stale(weight)
            return True
        if weight is not None:
            if weight.requires_grad:
                self.forget_weight()
                return True
            version = self.weight_version
            if version is None or not version.is_of(weight):
                self.refresh_if_stale(weight)
        return False

    def is_trained(self, weight: Tensor | None) -> bool:
        """Whether the constants are computed in every pass, from a weight that is trained or transformed.

        In evaluation too: not every optimizer's step is counted as a write.
        """
        if weight is None or weight.requires_grad:
            return weight is not None
        return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(weight)

    @property
    def settings(self) -> dict[str, Any]:
        """How the vectors are meant, as `functional.row_factors` takes it."""
        return {"scaling": self.scaling, "direction": self.direction, "detach_norm": self.detach_norm}

    @property
    def row_constants(self) -> RowConstants:
        """What closed forms need of the rows, kept with the other constants."""
        if self._row_constants is None:
            # Passes that train use them too, which inference tensors could not be.
            with torch.inference_mode(False), torch.no_grad():
                zero_rows = self.w == 0 if self.has_zero_rows else None
                w = self.w if zero_rows is None else torch.where(zero_rows, 1.0, self.w)
                unit = torch.full_like(w, self.scaling) if self.direction == "unit" else self.scaling / w
                zero_scale = None
                if zero_rows is not None:
                    unit = unit * ~zero_rows
                    zero_scale = self.scaling * zero_rows.to(w.dtype) if self.direction == "weight" else None
                self._row_constants = RowConstants(w, unit, w.new_ones(()), zero_rows, zero_scale)
        return self._row_constants

    def terms(self, lambda_d: Float[Tensor, "*N K"], weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """w, cross and q of `functional.row_factors`: from constants, or from a weight that is trained.

        Args:
            lambda_d: of one adapter or of N, in the dtype of w.
            weight: as stored.
        """
        trained = weight is not None and self.is_trained(weight)
        matrix = self.layout.matrix(weight) if weight is not None and (trained or self.reads_weight) else None
        w = self.w if matrix is None or not trained else F.row_norm(matrix)
        if self.by_groups is not None:
            terms = [self._terms_by_groups(part, matrix, w) for part in self._portions(lambda_d)]
            return w, *(terms[0] if len(terms) == 1 else map(torch.cat, zip(*terms, strict=True)))
        C = self.C if matrix is None else self._cross(matrix, w)
        return w, times_apart(lambda_d, as_dtype(C, w.dtype).T), self.squares(lambda_d)

    def terms_gradient(
        self, d_cross: Float[Tensor, "*N O"], d_half_q: Float[Tensor, "*N O"], lambda_d: Float[Tensor, "*N K"]
    ) -> Float[Tensor, "*N K"]:
        """The gradient of lambda_d from those of cross and q / 2."""
        if self.by_groups is None:
            return d_cross @ as_dtype(self.C, self.w.dtype) + self.squares_gradient(d_half_q, lambda_d)
        portions = [self._portions(rows) for rows in (d_cross, d_half_q, lambda_d)]
        if len(portions[0]) > 1:
            return torch.cat([self.terms_gradient(*portion) for portion in zip(*portions, strict=True)])
        B = self._rows_of_B(lambda_d)
        d_scaled = (B * d_half_q.unsqueeze(-1)).mT @ B @ self.scaled(lambda_d)
        if self.reads_weight:
            rows = B * (d_cross / self.row_constants.w).unsqueeze(-1)
            return self.scaled_gradient(d_scaled + rows.mT @ self._matrix())
        return self.scaled_gradient(d_scaled) + d_cross @ as_dtype(self.C, self.w.dtype)

    def _portions(self, rows: Float[Tensor, "*N M"]) -> Sequence[Float[Tensor, "*N M"]]:
        """Of one adapter, or of N in portions whose products by groups are not too large."""
        most = _AT_ONCE // (self.rank * (self.in_features + self.out_features))
        return [rows] if rows.dim() == 1 else rows.split(max(1, most))

    def scaled(self, lambda_d: Float[Tensor, "*N K"]) -> Float[Tensor, "*N R I"]:
        """`A'`, A with its columns scaled by their groups' lambda_d, in the dtype of that."""
        assert self.by_groups is not None
        return self.by_groups.scaled(self.A(lambda_d), lambda_d)

    def scaled_gradient(self, d_scaled: Float[Tensor, "*N R I"]) -> Float[Tensor, "*N K"]:
        """The gradient of lambda_d from that of `A'`."""
        assert self.by_groups is not None
        return self.by_groups.sums(self.A(d_scaled) * d_scaled)

    def update(self, lambda_d: Float[Tensor, "K"], scale: Float[Tensor, "O"] | None = None) -> Float[Tensor, "O I"]:
        """`D = B A'`, with rows times a scale, dense."""
        if not self.rank:
            return lambda_d.new_zeros(self.out_features, self.in_features)
        if self.by_groups is not None:
            B = self._rows_of_B(lambda_d)
            return (B if scale is None else B * scale[:, None]) @ self.scaled(lambda_d)
        D = self.dvora_projections.impl.update(lambda_d, self.in_features, self.out_features, scale)
        return D if self.padding_column is None else _without_column(D, self.padding_column)

    def squares(self, lambda_d: Float[Tensor, "*N K"]) -> Float[Tensor, "*N O"]:
        """q, the squared row norms of `B diag(lambda_d) A`, of one adapter or of N."""
        if not self.rank:
            return self.w.new_zeros(*lambda_d.shape[:-1], len(self.w))
        matrices = self._row_matrices
        q = matrices.squares(lambda_d, self.in_features, len(self.w))
        if self.padding_column is None:
            return q
        return q - matrices.expand(lambda_d * self._padding_of_A(lambda_d), len(self.w)).square()

    def squares_gradient(
        self, d_half_q: Float[Tensor, "*N O"], lambda_d: Float[Tensor, "*N K"]
    ) -> Float[Tensor, "*N K"]:
        """The gradient of `(d_half_q * q / 2).sum()` with respect to lambda_d."""
        if not self.rank:
            return torch.zeros_like(lambda_d)
        matrices = self._row_matrices
        gradient = matrices.squares_gradient(d_half_q, lambda_d, self.in_features)
        if self.padding_column is None:
            return gradient
        a = self._padding_of_A(lambda_d)
        skipped = matrices.expand(lambda_d * a, len(self.w))
        return gradient - a * matrices.expand_transpose(d_half_q * skipped, self.rank)

    def refresh_if_stale(self, weight: Tensor) -> None:
        """Compute the constants again if the weight has changed since, and is in memory."""
        version = self.weight_version
        # A step of a fused optimizer is not counted as a write.
        if not is_in_memory(weight) or (version and not weight.requires_grad and version.is_of(local(weight))):
            return
        if self._sample is not None and torch.equal(self._sample, _sample(local(weight))):
            self.weight_version = TensorVersion.of(local(weight))
        else:
            self.refresh(weight)

    def forget_weight(self) -> None:
        """Compute the constants again before they are used next: a step of the weight may not count as a write."""
        if self.weight_version is not None:
            self.weight_version = None

    def refresh_after_load(self, weight: Tensor) -> None:
        """Compute the constants again after a load: now, or for a DTensor in the next pass, which may gather it."""
        if is_dtensor(weight):
            self.weight_version = self._sample = self.kept = None
        else:
            self.refresh_if_stale(weight)

    def refresh(self, weight: Tensor) -> None:
        """Compute the constants.

        Raises:
            ValueError: a row norm of the weight is not finite.
        """
        shard = shard_of(weight, self.name) if is_dtensor(weight) else None
        if shard is not None and self.layout is not ROWS:
            raise ValueError(
                f"{self.name}: the weight is sharded over processes, which is supported for torch.nn.Linear only"
            )
        # Before the weight is read, since another thread may write to it meanwhile.
        version = TensorVersion.of(local(weight))
        with torch.inference_mode(False), torch.no_grad(), full_precision(weight.device):
            matrix = self.layout.matrix(full_tensor(weight.detach()))
            w = _row_norms(matrix)
            check_norms(w, self.name)
            self.reads_weight = self.by_groups is not None and self._can_read(weight)
            C = w.new_empty(len(w), 0) if self.reads_weight else self._cross(matrix, w)
            C = C.to(self._constant_dtype(matrix))
            if shard is not None:
                w, C = shard.of_rows(w), shard.of_rows(C)
            self._sample = _sample(local(weight)) if gathers_uncounted() else None
        self.has_zero_rows = w.is_meta or bool((w == 0).any())
        kind = self.shared.impl
        # Past the registration of modules: it is looked up in every pass, and registered with the projections.
        vars(self)["matrices"] = kind if shard is None else kind.of_shard(shard.inputs, shard.outputs)
        self.w, self.C, self.shard, self.weight_version = w, C, shard, version
        self.kept = self._row_constants = None
        self._weight = weakref.ref(weight)

    def A(self, like: Tensor) -> Float[Tensor, "R I"]:
        """The dense A of this weight, in the dtype and on the device of `like`."""
        if not self.rank:
            return like.new_empty(0, self.in_features)
        A = self.shared.impl.matrix("A", self.rank, self.in_features, like.dtype, like.device)
        return A if self.padding_column is None else _without_column(A, self.padding_column)

    def B(self, like: Tensor) -> Float[Tensor, "O R"]:
        """The dense B of this weight, in the dtype and on the device of `like`."""
        if not self.rank:
            return like.new_empty(self.out_features, 0)
        return self.shared.impl.matrix("B", self.rank, self.out_features, like.dtype, like.device).T

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            + (f"groups={self.groups}, " if self.by_groups else "")
            + f"alpha={self.alpha:g}, direction={self.direction!r}, detach_norm={self.detach_norm}"
        )

    @property
    def _row_matrices(self) -> Matrices:
        """B for the rows of this process, and the whole of A: no process has the norms of parts of rows."""
        return self.shared.impl if self.shard is None else self.shared.impl.of_shard(None, self.shard.outputs)

    def _padding_of_A(self, like: Tensor) -> Float[Tensor, "R"]:
        index = torch.tensor(self.padding_column, device=like.device)
        return self.shared.impl.select(index, self.rank, self.in_features, like.dtype)

    def _rows_of_B(self, like: Tensor) -> Float[Tensor, "O R"]:
        """B for the rows of this process, kept, in the dtype and on the device of `like`."""
        return self._row_matrices.matrix("B", self.rank, len(self.w), like.dtype, like.device).T

    def _can_read(self, weight: Tensor) -> bool:
        """Whether `cross` is computed from the weight, not from a constant that would be an eighth of it or more."""
        # Engines gather weights while their layers run, and not before; what a parametrization computes is not kept.
        is_kept = self.readable and isinstance(weight, nn.Parameter) and not weight.is_meta
        engines = torch.distributed.is_available() and torch.distributed.is_initialized()
        return is_kept and not engines and 8 * self.lambda_d_size >= self.in_features

    def _matrix(self) -> Float[Tensor, "O I"]:
        """The frozen weight that the constants are of, in the dtype of w."""
        weight = None if self._weight is None else self._weight()
        if weight is None or not is_in_memory(weight) or is_dtensor(weight):
            raise RuntimeError(
                f"{self.name}: the norm with lambda_d_groups={self.groups} needs the base's weight, which is not in "
                "memory; call torch.distributed.init_process_group before the adapter is made, where an "
                "engine shards the weight, or use lambda_d_groups=1"
            )
        return as_dtype(self.layout.matrix(weight.detach()), self.w.dtype)

    def _terms_by_groups(
        self, lambda_d: Float[Tensor, "*N K"], matrix: Float[Tensor, "O I"] | None, w: Float[Tensor, "O"]
    ) -> tuple[Float[Tensor, "*N O"], Float[Tensor, "*N O"]]:
        """`rowsum(W / w * (B A'))` and `rowsum((B A')**2)`, with the matrix where it was given or is read."""
        scaled, B = self.scaled(lambda_d), self._rows_of_B(lambda_d)
        q: Tensor = vecdot(_each(B, scaled @ scaled.mT), B)
        if matrix is None and not self.reads_weight:
            return times_apart(lambda_d, as_dtype(self.C, w.dtype).T), q
        matrix = self._matrix() if matrix is None else as_dtype(matrix, w.dtype)
        return vecdot(_each(matrix, scaled.mT), B) / torch.where(w > 0, w, 1.0), q

    def _cross(self, matrix: Float[Tensor, "O I"], w: Float[Tensor, "O"]) -> Float[Tensor, "O K"]:
        """`B * (W / w A^T)`, of all columns or group by group, by chunks of rows; differentiable in the weight."""
        if not self.rank:
            return w.new_empty(len(w), 0)
        B = self.shared.B(self.rank, len(w), w.dtype).to(w.device)
        rows, parts = max(1, _CHUNK_VALUES // matrix.shape[1]), []
        for part, of_w, of_B in zip(matrix.split(rows), w.split(rows), B.split(rows), strict=True):
            unit = F.unit_rows(part, of_w)
            updated = unit if self.padding_column is None else _without_column(unit, self.padding_column)
            if self.by_groups is None:
                parts.append(of_B * self.shared.impl.project(updated, self.rank))
            else:
                products = of_B * self.by_groups.products(updated, self.A(w))
                parts.append(products.transpose(0, 1).flatten(1))
        return torch.cat(parts)

    def _constant_dtype(self, matrix: Tensor) -> torch.dtype:
        """That of C: bfloat16 where it would take more than a quarter of a weight in half precision, else as w."""
        # Opaque weights are read as float32, so their dtype is no guide.
        narrow = matrix.dtype.itemsize == 2 or not self.readable
        small = len(matrix) * self.lambda_d_size * 4 <= max(2**20, matrix.numel() // 2)
        return torch.bfloat16 if narrow and not small else norm_dtype(matrix.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedWeight":
        if recurse:
            self.shared._apply(fn)
        # C follows device moves only: its dtype was chosen by its size.
        C, self.C = self.C, None  # type: ignore[assignment]
        super()._apply(at_least_float32(fn), recurse=False)
        device = fn(C.new_empty(0)).device
        self.C = C.new_empty(C.shape, device=device) if C.is_meta else C.to(device)
        self.kept = self._row_constants = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        derived = ("kept", "_row_constants", "weight_version", "_sample", "_weight", "shard")
        return {**self.__dict__, **dict.fromkeys(derived)}


def _row_norms(matrix: Float[Tensor, "O I"]) -> Float[Tensor, "O"]:
    """The norms of the rows of a frozen weight, correct also where squares underflow in float32."""
    w = F.row_norm(matrix)
    tiny = w < _SURE_NORM
    if not w.is_meta and tiny.any():
        # On the CPU, since not every device has float64.
        w[tiny] = torch.linalg.vector_norm(matrix[tiny].cpu(), dim=1, dtype=torch.float64).to(w)
    return w


@torch.no_grad()
def _sample(weight: Tensor) -> Float[Tensor, "2 O"]:
    """The norm of every row, and its product with one fixed vector, which differs for other signs and places."""
    rows = weight.detach().flatten(1)
    # Multiples of an irrational number, so that no two columns get the same weight.
    fixed = torch.frac(torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32) * 0.6180339887)
    norms = F.row_norm(rows)
    return torch.stack([norms, (rows @ (fixed - 0.5).to(rows.dtype)).to(norms.dtype)])


class JoinedWeights:
    """Frozen weights as one whose rows follow one another: what is computed by row is one operation for all.

    It has what `factors` asks of an `AdaptedWeight`.

    Args:
        weights: of one device and one `direction` and `detach_norm`.
    """

    def __init__(self, weights: Sequence[AdaptedWeight]) -> None:
        self.weights = weights
        self.rows = [adapted.out_features for adapted in weights]
        self.sizes = [adapted.lambda_d_size for adapted in weights]
        self.w = torch.cat([adapted.w for adapted in weights])
        self.direction, self.detach_norm = weights[0].direction, weights[0].detach_norm
        self.kept: object = None

    @property
    def settings(self) -> dict[str, Any]:
        """As of one weight; the scaling of each row."""
        scaling = torch.cat([torch.full_like(adapted.w, adapted.scaling) for adapted in self.weights])
        return {"scaling": scaling, "direction": self.direction, "detach_norm": self.detach_norm}

    @cached_property
    def row_constants(self) -> RowConstants:
        """Those of all rows; the backward pass asks for them too."""
        w, unit, one, zero_rows, zero_scale = zip(*(a.row_constants for a in self.weights), strict=True)
        return RowConstants(torch.cat(w), torch.cat(unit), one[0], _joined(zero_rows, w), _joined(zero_scale, w))

    def terms(self, lambda_d: Float[Tensor, "*N K"], weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """w, cross and q, from constants. `lambda_d` (N, K) has those of all weights."""
        assert weight is None
        parts = lambda_d.split(self.sizes, -1)
        cross, q = dict[int, Tensor](), dict[int, Tensor]()
        # Weights of one shape have the same squares of B: one product for all of them.
        alike: dict[object, list[int]] = {}
        for place, (adapted, part) in enumerate(zip(self.weights, parts, strict=True)):
            if adapted.by_groups is not None:
                _, cross[place], q[place] = adapted.terms(part)
                continue
            cross[place] = times_apart(part, as_dtype(adapted.C, adapted.w.dtype).T)
            sizes = adapted.in_features, adapted.out_features, adapted.padding_column
            alike.setdefault((*adapted.update_key, *sizes), []).append(place)
        for places in alike.values():
            rows = torch.cat([parts[place] for place in places])
            q |= zip(places, self.weights[places[0]].squares(rows).split(len(lambda_d)), strict=True)
        crosses, squares = ([of[place] for place in range(len(parts))] for of in (cross, q))
        return self.w, torch.cat(crosses, -1), torch.cat(squares, -1)

    def terms_gradient(
        self, d_cross: Float[Tensor, "*N O"], d_half_q: Float[Tensor, "*N O"], lambda_d: Float[Tensor, "*N K"]
    ) -> Float[Tensor, "*N K"]:
        """The gradient of lambda_d from those of cross and q / 2."""
        of_rows = d_cross.split(self.rows, -1), d_half_q.split(self.rows, -1)
        parts = zip(self.weights, *of_rows, lambda_d.split(self.sizes, -1), strict=True)
        return torch.cat([adapted.terms_gradient(*of_weight) for adapted, *of_weight in parts], -1)


def _each(matrix: Float[Tensor, "O M"], others: Float[Tensor, "*N M R"]) -> Float[Tensor, "*N O R"]:
    """The product of a matrix with one other, or with each of N by itself, as `times_apart` has it."""
    if others.dim() == 2:
        return matrix @ others
    return torch.bmm(matrix.expand(len(others), *matrix.shape), others)


def _joined(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
    """The parts as one tensor, with zeros for those that are None; None for None alone."""
    some = next((part for part in parts if part is not None), None)
    if some is None:
        return None
    return torch.cat(
        [torch.zeros_like(w, dtype=some.dtype) if p is None else p for p, w in zip(parts, like, strict=True)]
    )


def _without_column(matrix: Float[Tensor, "N I"], column: int) -> Float[Tensor, "N I"]:
    """The matrix with zeros in one column."""
    return matrix.index_fill(1, torch.tensor([column], device=matrix.device), 0.0)


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
