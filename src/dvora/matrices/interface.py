"""SharedProjections: the frozen random matrices A and B of DVoRA, held once and shared by all layers of all sizes.

Two kinds behind one interface: `dense` stores matrices, `structured` applies fast transforms.
Dimensions: T tokens, I in, O out, R rank.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.annotations import Float
from ..ops.dtypes import without_autocast
from ..ops.passes import current_pass
from ..ops.tracing import grad_recorded, is_traced, runs_plainly
from ..ops.triton.available import check_triton
from .dense import DenseMatrices
from .shard import Shard
from .shared_input import ProjectionCache, projected_in_pass
from .structured import StructuredMatrices
from .vera import VeraMatrices, vera_sizes

FORMAT_VERSION = 1
"""Version of the map from (seed, stream, row, column) to a value. A change of any value needs a new number."""

Distribution = Literal["kaiming_uniform", "structured"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
"""Those for layers of any size. "peft_vera(r=R, in=I, out=O)" names the matrices of one adapter of PEFT's VeRA."""
_REMOVED = ("gaussian", "rademacher", "orthogonal")
"""Kinds of development versions. They trained as well as "kaiming_uniform", and no faster than "structured"."""


@runtime_checkable
class Matrices(Protocol):
    """What both kinds of matrices do; `method` calls those that take a scale, sums and gradients of the norm."""

    products_are_cheap: bool
    """Whether products with A and B are recomputed rather than kept."""
    use_triton: bool
    """Whether CUDA tensors go through the Triton kernels."""

    def of_shard(self, inputs: Shard | None, outputs: Shard | None) -> "Matrices":
        """The columns of A and the rows of B of one process; sizes are then its own, but G is that of all of A."""

    def reserve(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Make the matrices for a layer now, and what norms in that dtype need."""

    def project(self, x: Float[Tensor, "*T I"], rank: int) -> Float[Tensor, "*T R"]:
        """`x A^T`."""

    def project_transpose(self, h: Float[Tensor, "*T R"], in_features: int) -> Float[Tensor, "*T I"]:
        """`h A`."""

    def expand(self, z: Float[Tensor, "*T R"], out_features: int) -> Float[Tensor, "*T O"]:
        """`z B^T`."""

    def expand_transpose(
        self, d: Float[Tensor, "*T O"], rank: int, scale: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "*T R"]:
        """`(d * scale) B`; not differentiable with a scale."""

    def prepared_projection(
        self, rank: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """`project` for x of one width, dtype and device, without autocast and gradients; of one token it is (1, R)."""

    def prepared_update(
        self, lambda_d: Float[Tensor, "*B R"], scale: Float[Tensor, "*B O"], dtype: torch.dtype
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The function from z (*T, R) and outputs (*T, O) or None to the outputs plus `((z lambda_d) B^T) * scale`.

        It is for z of one dtype, writes into the outputs, and is not differentiable.
        """

    def update_gradients(
        self,
        d: Float[Tensor, "T O"],
        z: Float[Tensor, "T R"],
        lambda_d: Float[Tensor, "R"],
        scale: Float[Tensor, "O"],
        d_scale: Float[Tensor, "O"],
    ) -> tuple[Float[Tensor, "T R"], Float[Tensor, "R"]]:
        """The gradients of `(d * update(z)).sum()` with respect to z and lambda_d, for d in the dtype of z.

        That with respect to the scale is written into `d_scale`.
        """

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        """Columns of A by index."""

    def A(self, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "R I"]:
        """The dense matrix A."""

    def B(self, rank: int, out_features: int, dtype: torch.dtype) -> Float[Tensor, "O R"]:
        """The dense matrix B."""

    def gram(self, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "R R"]:
        """`G = A A^T`."""

    def row_squares(
        self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int
    ) -> Float[Tensor, "*L O"]:
        """`q = ||B diag(lambda_d) A||_row**2`, of one layer or of several."""

    def row_squares_half_gradient(
        self, v: Float[Tensor, "*L O"], lambda_d: Float[Tensor, "*L R"], in_features: int
    ) -> Float[Tensor, "*L R"]:
        """Half the gradient of `(v * q).sum()` with respect to lambda_d."""

    def half_dq(
        self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int
    ) -> Float[Tensor, "*L R O"] | None:
        """Half the derivative of q by lambda_d, so `q = lambda_d @ half_dq`; None where it is not worth its memory."""

    def row_dots(self, weight: Float[Tensor, "O I"], lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "O"]:
        """`cross = rowsum(W * (B diag(lambda_d) A))`, by chunks of rows."""

    def row_dots_gradient(self, weight: Float[Tensor, "O I"], v: Float[Tensor, "O"], rank: int) -> Float[Tensor, "R"]:
        """The gradient of `(v * cross).sum()` with respect to lambda_d."""

    def fingerprint_values(self) -> np.ndarray:
        """Some values, for the fingerprint."""

    def saved_tensors(self) -> dict[str, Tensor]:
        """What files hold."""

    def remade(self, name: str, saved: Tensor) -> Tensor | None:
        """What a tensor of a file should be; None for an unknown name."""


class SharedProjections(nn.Module):
    """The frozen `A` and `B` of one seed and distribution, for every layer size and rank, made on demand.

    One object serves a whole model: its matrices are buffers outside the state dict that follow device moves, ignore
    casts (they stay float32) and are made again from the seed when the module leaves the meta device.

    Args:
        seed: names the matrices, 0 <= seed < 2**64.
        distribution: "kaiming_uniform", stored matrices of independent values, or "structured", a randomised cosine
            transform whose cost hardly grows with the rank in wide layers. Both are reproducible bit for bit. The
            default is not that of `DVoRAConfig`, because the state dict of a plain layer does not say which it was
            trained with. An adapter that comes from PEFT's VeRA has "peft_vera(r=R, in=I, out=O)", torch's values for
            a seed.
        share_inputs: compute `x A^T` once for the layers that read the same x, one after another (`shared_input`).
            Also an attribute; switch it off where x is written to in between by something that PyTorch does not count.
        use_triton: run CUDA tensors through Triton kernels. Off by default, because the kernels have only been run in
            Triton's interpreter and compiled, never on a GPU. CPU tensors are not affected.

    Raises:
        TypeError: `seed` is not an integer or `use_triton` no bool.
        ValueError: `seed` is out of range, `distribution` is unknown, or Triton is asked for and cannot run.
    """

    def __init__(
        self,
        seed: int = 0,
        distribution: str = "kaiming_uniform",
        *,
        share_inputs: bool = True,
        use_triton: bool = False,
    ) -> None:
        super().__init__()
        self.share_inputs = share_inputs
        self.seed = _checked_seed(seed)
        self.distribution = checked_distribution(distribution)
        self.use_triton = _checked_use_triton(use_triton)
        self.impl = _matrices(seed, self.distribution, use_triton)
        self._projection_cache = ProjectionCache()

    def reserve(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> None:
        """Make the matrices for a layer, and what norms in that dtype need, now, so that no forward pass has to."""
        self.impl.reserve(rank, in_features, out_features, dtype)

    def project_once(self, x: Float[Tensor, "*T I"], rank: int, reader: object) -> Float[Tensor, "*T R"]:
        """`x A^T`, computed once for all layers that read the same `x`; `reader` is the layer that asks."""
        if not self.share_inputs:
            return projected(x, rank, self.impl)
        running = current_pass()
        if running is not None and x.is_cpu and runs_plainly():
            return projected_in_pass(x, rank, self.impl, id(reader), partial(self.impl.project, rank=rank), running)
        return self._projection_cache.of(x, rank, reader, partial(projected, matrices=self.impl))

    def A(self, rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R I"]:
        """The dense matrix `A`."""
        return self.impl.A(rank, in_features, dtype)

    def B(self, rank: int, out_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "O R"]:
        """The dense matrix `B`."""
        return self.impl.B(rank, out_features, dtype)

    def fingerprint(self) -> str:
        """A short hash of format version, distribution and some values; equal hashes mean equal matrices."""
        head = f"dvora-projections/{FORMAT_VERSION}/{self.distribution}/".encode()
        return hashlib.sha256(head + self.impl.fingerprint_values().astype("<f4").tobytes()).hexdigest()[:16]

    def saved_tensors(self) -> dict[str, Tensor]:
        """The stored values as they are written into files."""
        return self.impl.saved_tensors()

    def check_saved_tensors(self, matrices: Mapping[str, Tensor]) -> None:
        """Compare matrices of a file, as of `matrices`, with those made from the seed.

        Raises:
            ValueError: a name or a value differs.
        """
        for name, saved in matrices.items():
            made = self.impl.remade(name, saved) if saved.is_floating_point() else None
            if made is None or not torch.equal(made, saved.to(made)):
                raise ValueError(
                    f"the saved projection matrix {name} differs from the one that seed {self.seed} and distribution "
                    f"{self.distribution!r} give; the file is damaged or was trained with other matrices"
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self.seed}, distribution={self.distribution!r})"


def projected(x: Float[Tensor, "*T I"], rank: int, matrices: Matrices) -> Float[Tensor, "*T R"]:
    """`x A^T`; nothing is saved for the backward pass."""
    if is_traced() or not (x.requires_grad and grad_recorded()):
        return matrices.project(x, rank)
    z: Tensor = _Projection.apply(x, rank, matrices)
    return z


class _Projection(torch.autograd.Function):
    """`x A^T`, which saves nothing, so any number of backward passes may go through a shared projection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, kind: Matrices) -> Tensor:
        ctx.in_features, ctx.kind = x.shape[-1], kind
        return kind.project(x, rank)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None, None]:
        kind: Matrices = ctx.kind
        return kind.project_transpose(h, ctx.in_features), None, None


def checked_distribution(distribution: str) -> str:
    """The distribution, if it is known."""
    if distribution in _REMOVED:
        raise ValueError(
            f"distribution {distribution!r} was removed before version 0.1.0: take 'kaiming_uniform', which trains as "
            "well, or 'structured', which is faster at high ranks. An adapter that was trained with it can only be "
            "merged into its base, by the development version that made it"
        )
    known = distribution in DISTRIBUTIONS or (isinstance(distribution, str) and vera_sizes(distribution) is not None)
    if not known:
        raise ValueError(f"unknown distribution {distribution!r}, expected one of {', '.join(DISTRIBUTIONS)}")
    return distribution


def _matrices(seed: int, distribution: str, use_triton: bool) -> Matrices:
    if (sizes := vera_sizes(distribution)) is not None:
        return VeraMatrices(seed, sizes, use_triton)
    if distribution == "structured":
        return StructuredMatrices(seed, use_triton)
    return DenseMatrices(seed, use_triton=use_triton)


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r} of type {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0 .. 2**64 - 1, got {seed}")
    return seed


def _checked_use_triton(use_triton: bool) -> bool:
    if not isinstance(use_triton, bool):
        raise TypeError(f"use_triton must be True or False, got {use_triton!r}")
    if use_triton:
        check_triton()
    return use_triton
