"""One adapted weight without its trained vectors: projections, norm constants and hyperparameters.

The plain layer and the PEFT layers own their vectors and share the rest through this module, so that gain and merge are
written once, for every way of storing a weight.

The norm constants belong to one version of the base weight. They are recomputed after the weight was replaced, written
to, cast or moved; while the weight is trained, they are computed in every pass, with gradients.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.fsdp2 import note_never_gathered
from ..engines.tensor_parallel import TensorParallelShard, check_whole, full_tensor, is_dtensor, local, shard_of
from ..engines.zero3 import is_in_memory
from ..matrices.interface import Matrices, SharedProjections
from ..method import functional as F
from ..method.functional import Direction, RowFactors, Vectors
from ..method.gain import RowSettings, row_factors
from ..method.norm import FrozenNorm, NormCache, cache_dtype, cross_matrix, row_norms, without_column
from ..method.packed_factors import PackedFactors
from ..method.small_rows import small_rows
from ..method.validation import (
    check_norms,
    check_weight,
    checked_alpha,
    checked_direction,
    checked_rank,
)
from ..ops.annotations import Float
from ..ops.dtypes import at_least_float32, full_precision, norm_dtype
from ..ops.tracing import is_traced, version_of
from .layouts import ROWS, Layout
from .tensor_state import WeightVersion

_ATTEMPTS = 3
"""Attempts to compute constants while nothing writes to the weight; after the last, the next pass tries again."""
_ONE_AT_A_TIME = threading.Lock()
"""Held while constants are assigned, so that no thread sees those of two versions of a weight."""
MAGNITUDE_ONLY = 0
"""The rank of a weight that gets a magnitude and no update."""


class KeptFactors:
    """Factors and plans of the last passes of a weight; assigning attributes of a module would take longer."""

    __slots__ = ("evaluated", "stacked", "training_plan")

    def __init__(self) -> None:
        self.training_plan: Any = None
        self.stacked: Any = None
        """In training, made together with those of other layers."""
        self.evaluated: Any = None


class AdaptedWeight(nn.Module):
    """The frozen side of one adapted weight.

    Methods take the weight as the layer stores it, or None where only the constants are in memory (a quantised layer).

    Args:
        weight: the base's, as stored.
        rank: R, or `MAGNITUDE_ONLY`.
        shared: the frozen projections.
        alpha: the update is scaled by `alpha / rank`; None means `rank`.
        direction: what the update is added to, the "unit" rows or the "weight".
        detach_norm: leave the gradient through the norm out (DoRA, section 4.3).
        layout: how the weight is stored.
        padding_column: a column of the weight's matrix that the update does not change: an embedding's padding entry.
        readable: whether the weight can be read in every pass; that of a quantised layer cannot.
        norm_cache: keep the (O, R) constants (True), recompute them in every step (False), or "auto" (`cache_dtype`).
        name: of the layer, for error messages.

    Raises:
        TypeError: the weight is not floating or `rank` is not an integer.
        ValueError: the weight is on the meta device or not finite, or a hyperparameter is out of range.
    """

    w: Tensor
    C: Tensor | None
    small: Tensor | None

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
        padding_column: int | None = None,
        readable: bool = True,
        norm_cache: NormCache = "auto",
        name: str = "layer",
    ) -> None:
        super().__init__()
        check_weight(weight, name)
        note_never_gathered(weight)
        self.layout = layout
        self.out_features, self.in_features = layout.matrix(weight).shape
        self.rank = rank if rank == MAGNITUDE_ONLY else checked_rank(rank)
        self.alpha = float(rank) if alpha is None else checked_alpha(alpha)
        self.scaling = self.alpha / self.rank if self.rank else 0.0
        self.direction = checked_direction(direction)
        self.detach_norm = detach_norm
        self.padding_column = padding_column
        self.name = name
        # A name that no model uses, since PEFT finds modules to save by the ends of their names.
        self.dvora_projections = shared
        self.update_key = shared.seed, shared.distribution, shared.use_triton, self.rank
        """Adapters of equal keys have the same A and B in a layer."""
        if self.rank:
            shared.reserve(rank, self.in_features, self.out_features, norm_dtype(weight.dtype))
        self.readable = readable
        self.norm_cache = norm_cache
        self._weight_version: WeightVersion | None = None
        self.shard: TensorParallelShard | None = None
        """The shard on this process, of a weight that is a DTensor."""
        self.kept = KeptFactors()
        self.zero_rows = True
        """Whether some rows of the weight may be zero."""
        self.register_buffer("w", None, persistent=False)
        self.register_buffer("C", None, persistent=False)
        self.register_buffer("small", None, persistent=False)
        self._small_of: tuple[int, int] | None = None
        self.refresh(weight)

    @property
    def shared(self) -> SharedProjections:
        """The frozen projections."""
        return self.dvora_projections

    def initial_vectors(self, d_initial: float) -> Vectors:
        """The starting values, for which the layer equals its base: m = w, lambda_b = 0, lambda_d = `d_initial`."""
        with torch.inference_mode(False):
            return Vectors(self.w.clone(), torch.zeros_like(self.w), self.w.new_full((self.rank,), float(d_initial)))

    @property
    def matrices(self) -> Matrices:
        """A and B for this process's shard of the weight."""
        # Not as attributes, which modules take as long to look up as a small product takes.
        kind: Matrices = self._modules["dvora_projections"]._modules["impl"]  # type: ignore[union-attr, assignment]
        return kind if self.shard is None else kind.of_shard(self.shard.inputs, self.shard.outputs)

    def local(self, vectors: Vectors, weight: Tensor | None) -> Vectors:
        """The vectors for this process's shard of the weight; all of them, if the weight is not sharded.

        Raises:
            ValueError: the weight is sharded in a way that is not supported, or trained.
        """
        if not is_dtensor(weight):
            return vectors
        assert weight is not None
        if weight.requires_grad:
            raise ValueError(f"{self.name}: a base weight that is sharded over processes cannot be trained; freeze it")
        self.refresh_if_stale(weight)
        return vectors if self.shard is None else self.shard.vectors(vectors)

    def norm(self, weight: Tensor | None) -> FrozenNorm:
        """The norm of the weight as it is now."""
        if weight is None or not is_in_memory(weight):
            return self._norm(None, self.w, self.C)
        # A compiled graph cannot read versions: it captures the constants of a frozen weight.
        compiling = torch.compiler.is_compiling()
        if weight.requires_grad and (torch.is_grad_enabled() or compiling):
            matrix = self.layout.matrix(weight)
            with full_precision(weight.device):
                return self._norm(matrix, F.row_norm(matrix), self._cross(matrix, norm_dtype(matrix.dtype)))
        if not compiling:
            self.refresh_if_stale(weight)
        # With sharded columns no process has whole rows, which nearly cancelled ones are computed from.
        whole_rows = self.shard is None or self.shard.inputs is None
        return self._norm(self.layout.matrix(local(weight).detach()) if whole_rows else None, self.w, self.C)

    def refresh_if_stale(self, weight: Tensor) -> None:
        """Recompute the constants if the weight has changed since, and is in memory."""
        held, version = local(weight), self._weight_version
        if not is_in_memory(weight) or (version is not None and version.is_of(held)):
            return
        again = version is not None and version.was_gathered_again(held)
        if version is None or not (again and version.has_values_of(held)):
            self.refresh(weight)
            if again:
                self._weight_version = WeightVersion(held, gathered_again=True)

    def refresh_after_load(self, weight: Tensor) -> None:
        """Recompute the constants after a load: now, or for a DTensor in the next pass, which may gather it."""
        if is_dtensor(weight):
            self._weight_version = None
            self.kept.evaluated = None
        else:
            self.refresh_if_stale(weight)

    def refresh(self, weight: Tensor) -> None:
        """Recompute the constants.

        Raises:
            ValueError: a row norm of the weight is not finite.
        """
        shard = self._checked_shard(weight)
        if any(buffer.is_meta for buffer in self.shared.buffers()):
            # A load with assign=True restores values, but not buffers that no file holds.
            self.shared.to_empty(device=weight.device)
        held = local(weight)
        for attempt in reversed(range(_ATTEMPTS)):
            # Before the weight is read, since another thread may write to it meanwhile.
            version = WeightVersion(held)
            with torch.inference_mode(False), torch.no_grad(), full_precision(weight.device):
                w, C = self._constants(weight, shard)
            with _ONE_AT_A_TIME:
                if version.was_written_to(held) and attempt:
                    continue
                self.w, self.C, self.small = w, C, None
                self.zero_rows = w.is_meta or bool((w == 0).any())
                self.shard, self._weight_version, self._small_of = shard, version, None
            break
        self.kept = KeptFactors()

    def replace_C(self, known: Tensor | None, same: Tensor) -> None:
        """Keep the same values in other memory, unless C is not what is known: another thread may have refreshed it."""
        with _ONE_AT_A_TIME:
            if self.C is known:
                self.C = same

    def small_rows(self, bias: Float[Tensor, "O"] | None) -> Tensor | None:
        """Indices of the rows that are small beside their bias (`small_rows`); None without any."""
        if bias is None or self.shard is not None:
            return None
        state = None if is_traced() else (id(bias), version_of(bias))
        if state is not None and state != self._small_of:
            with torch.inference_mode(False):
                self.small = small_rows(self.w, bias)
            self._small_of = state
        return self.small

    def A(self, like: Tensor) -> Float[Tensor, "R I"]:
        """The dense A of this weight, in the dtype and on the device of `like`."""
        if not self.rank:
            return like.new_empty(0, self.in_features)
        A = self.shared.A(self.rank, self.in_features, like.dtype).to(like.device)
        return A if self.padding_column is None else without_column(A, self.padding_column)

    def B(self, like: Tensor) -> Float[Tensor, "O R"]:
        """The dense B of this weight, in the dtype and on the device of `like`."""
        if not self.rank:
            return like.new_empty(self.out_features, 0)
        return self.shared.B(self.rank, self.out_features, like.dtype).to(like.device)

    @property
    def settings(self) -> RowSettings:
        """What the factors of the rows depend on, besides vectors and weight."""
        return RowSettings(self.scaling, self.direction, self.detach_norm)

    @property
    def stack_key(self) -> tuple[object, ...]:
        """What weights have in common whose row factors are made as one stack."""
        sizes = self.out_features, self.in_features, self.rank, self.padding_column
        return *sizes, self.settings, id(self.shared.impl), self.w.dtype, self.w.device

    def factors(self, vectors: Vectors, weight: Tensor | None) -> RowFactors:
        """What the rows are rescaled with, made from the vectors."""
        packed, _ = self.packed_factors(vectors, weight)
        return packed.rows

    def packed_factors(self, vectors: Vectors, weight: Tensor | None) -> tuple[PackedFactors, Tensor]:
        """The same as few tensors, and the norms that they were made with."""
        norm = self.norm(weight)
        if not (norm.w.requires_grad or is_traced()):
            return row_factors([vectors], [norm], self.settings).packed[0], norm.w
        return PackedFactors.of(self._factors(vectors, norm), vectors.lambda_d), norm.w

    def delta(self, vectors: Vectors, weight: Tensor) -> Float[Tensor, "O I"]:
        """`W' - W` as a dense matrix, in float32 or float64.

        Raises:
            ValueError: the weight is sharded over processes.
        """
        check_whole(weight, self.name)
        factors = self.factors(vectors, weight)
        with full_precision(factors.scale.device):
            matrix, lambda_d = self.layout.matrix(weight), vectors.lambda_d.to(factors.scale.dtype)
            return F.rescaled_delta(matrix, self.A(lambda_d), self.B(lambda_d), lambda_d, factors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha:g}, direction={self.direction!r}, detach_norm={self.detach_norm}"
        )

    def _factors(self, vectors: Vectors, norm: FrozenNorm) -> RowFactors:
        """Differentiated by PyTorch."""
        vectors = vectors.to(norm.w.dtype)
        with full_precision(norm.w.device):
            beta = F.row_scale(vectors.lambda_b, norm.w, self.scaling, self.direction)
            return F.row_factors(vectors, norm, beta, self.detach_norm)

    def _checked_shard(self, weight: Tensor) -> TensorParallelShard | None:
        """The shard on this process, if the layer's settings allow one."""
        shard = shard_of(weight, self.name) if is_dtensor(weight) else None
        if shard is not None and self.layout is not ROWS:
            raise ValueError(
                f"{self.name}: the weight is sharded over processes, which is supported for torch.nn.Linear only"
            )
        if self.norm_cache is False and not self._is_readable(shard):
            raise ValueError(
                f"{self.name}: norm_cache=False computes the norm's constants from the weight in every step, and this "
                "layer's weight cannot be read then (it is quantised or offloaded, or its inputs are sharded); "
                'use "auto" or True'
            )
        return shard

    def _is_readable(self, shard: TensorParallelShard | None) -> bool:
        return self.readable and (shard is None or shard.inputs is None)

    def _constants(self, weight: Tensor, shard: TensorParallelShard | None) -> tuple[Tensor, Tensor | None]:
        """w, and C where it is kept, for the rows of this process."""
        matrix = self.layout.matrix(full_tensor(weight.detach()))
        w = row_norms(matrix)
        check_norms(w, self.name)
        cheap = self.shared.impl.products_are_cheap
        dtype = cache_dtype(matrix, self.rank, self.norm_cache, cheap, self._is_readable(shard))
        C = None if dtype is None else self._cross(matrix, dtype)
        if shard is None:
            return w, C
        return shard.of_rows(w), None if C is None else shard.of_rows(C)

    def _norm(self, matrix: Tensor | None, w: Tensor, C: Tensor | None) -> FrozenNorm:
        if self.rank and C is None and matrix is None:
            raise RuntimeError(
                f"{self.name}: the weight is not in memory (it was offloaded, or DeepSpeed ZeRO-3 holds parts of it), "
                "and the norm's constants were not kept; adapt with norm_cache=True, or after the model was offloaded"
            )
        shard = self.shard
        matrices = self.shared.impl if shard is None else self.shared.impl.of_shard(None, shard.outputs)
        return FrozenNorm(w, self.zero_rows, C, matrix, matrices, self.in_features, self.rank, self.padding_column)

    def _cross(self, matrix: Float[Tensor, "O I"], dtype: torch.dtype) -> Float[Tensor, "O R"]:
        if not self.rank:
            return matrix.new_empty(len(matrix), 0, dtype=dtype)
        return cross_matrix(matrix, self.shared.impl, self.rank, self.padding_column, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedWeight":
        if recurse:
            self.shared._apply(fn)
        self._small_of = None
        # C follows device moves only: its dtype was chosen by its size.
        C, self.C = self.C, None
        super()._apply(at_least_float32(fn), recurse=False)
        if C is not None:
            device = fn(C.new_empty(0)).device
            self.C = C.new_empty(C.shape, device=device) if C.is_meta else C.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # C may be a part of the tensor that all layers share, of which a copy would hold the whole.
        buffers = {**self._buffers, "C": None if self.C is None else self.C.clone()}
        of_passes = {"kept": KeptFactors(), "_weight_version": None, "_small_of": None, "shard": None}
        return {**self.__dict__, **of_passes, "_buffers": buffers}
