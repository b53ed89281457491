"""The frozen random matrices A and B of DVoRA, held once and shared by all layers of all sizes.

Dimensions: I in, O out, R rank, K = min(rank, in).

    A (R, I): row k of A is row k of stream 0, cut to I columns and scaled by sqrt(2 / I)
    B (O, R): column k of B is row k of stream 1, cut to O values and scaled by sqrt(2 / R)

Both have the entry variance of Kaiming uniform, 2 / fan_in. The scale belongs to the layer's size and is not stored,
so layers of any size and adapters of any rank use the same values (VeRA, arXiv 2310.11454).
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from . import generator
from .shapes import Float

FORMAT_VERSION = 1
"""Version of the map from (seed, stream, row, column) to a value. A change of any value needs a new number."""

Distribution = Literal["kaiming_uniform", "gaussian", "orthogonal"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)

_STREAM_A, _STREAM_B = 0, 1
_ENTRY_VARIANCE = {"kaiming_uniform": 1 / 3, "gaussian": 1.0, "orthogonal": 1.0}
_ROW = {"kaiming_uniform": generator.uniform_row, "gaussian": generator.gaussian_row}


class SharedProjections(nn.Module):
    """The frozen `A` and `B` of one seed and distribution, for every layer size and rank, made on demand.

    One object serves a whole model: its matrices are buffers outside the state dict that follow device moves, ignore
    casts (they stay float32) and are made again from the seed when the module leaves the meta device.

    Args:
        seed: names the matrices, 0 <= seed < 2**64.
        distribution: "kaiming_uniform", "gaussian" or "orthogonal" (rows of A and columns of B orthogonal in blocks
            of at most the layer's size). All three are bit for bit reproducible.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is out of range or `distribution` is unknown.
    """

    def __init__(self, seed: int = 0, distribution: Distribution = "kaiming_uniform") -> None:
        super().__init__()
        self.seed = _checked_seed(seed)
        self.distribution = checked_distribution(distribution)
        self._bases: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def reserve(self, rank: int, in_features: int, out_features: int) -> None:
        """Make the matrices for a layer now, so that no forward pass has to."""
        self._stored(_STREAM_A, rank, in_features)
        self._stored(_STREAM_B, rank, out_features)

    def project(self, x: Float[Tensor, "*T I"], rank: int) -> Float[Tensor, "*T R"]:
        """`x A^T`, in the dtype of `x`."""
        # Scaled before the product: in float16 the unscaled sum of a wide input would overflow.
        return nn.functional.linear(x * self._scale(x.shape[-1]), self._like(_STREAM_A, rank, x.shape[-1], x))

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        """`onehot(index) A^T`: columns of A by index, without reading the others."""
        stored = self._stored(_STREAM_A, rank, in_features).to(index.device)
        return stored[:, index].movedim(0, -1).to(dtype) * self._scale(in_features)

    def project_transpose(self, h: Float[Tensor, "*T R"], in_features: int) -> Float[Tensor, "*T I"]:
        """`h A`, the transpose of `project`, in the dtype of `h`."""
        return (h * self._scale(in_features)) @ self._like(_STREAM_A, h.shape[-1], in_features, h)

    def expand(self, z: Float[Tensor, "*T R"], out_features: int) -> Float[Tensor, "*T O"]:
        """`z B^T`, in the dtype of `z`."""
        return (z * self._scale(z.shape[-1])) @ self._like(_STREAM_B, z.shape[-1], out_features, z)

    def expand_transpose(self, d: Float[Tensor, "*T O"], rank: int) -> Float[Tensor, "*T R"]:
        """`d B`, the transpose of `expand`, in the dtype of `d`."""
        return nn.functional.linear(d * self._scale(rank), self._like(_STREAM_B, rank, d.shape[-1], d))

    def A(self, rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R I"]:
        """The dense matrix `A`."""
        return self._stored(_STREAM_A, rank, in_features).to(dtype) * self._scale(in_features)

    def B(self, rank: int, out_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "O R"]:
        """The dense matrix `B`."""
        return self._stored(_STREAM_B, rank, out_features).to(dtype).T * self._scale(rank)

    def gram(self, rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R R"]:
        """`G = A A^T`, summed in float64."""
        A = self.A(rank, in_features, torch.float64)
        return (A @ A.T).to(dtype)

    def factor(self, rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R K"]:
        """The matrix `L` of `A = L Q` with orthonormal rows `Q`; `L L^T = G`. Kept as a buffer for each size."""
        name = f"factor_{rank}x{in_features}_{_dtype_name(dtype)}"
        if name not in self._buffers:
            self._decompose(rank, in_features, dtype)
        return self.get_buffer(name)

    def basis(self, rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "K I"]:
        """The matrix `Q` of `A = L Q`: an orthonormal basis of the rows of `A`, on the CPU. Kept for each size.

        Only set-up needs it, so it is no buffer: it neither moves nor is exported.
        """
        if (rank, in_features, dtype) not in self._bases:
            self._decompose(rank, in_features, dtype)
        return self._bases[rank, in_features, dtype]

    def fingerprint(self) -> str:
        """A short hash of format version, distribution and a probe of the values; equal means equal matrices."""
        probe = [_unit_rows(self.distribution, self.seed, stream, 8, 16) for stream in (_STREAM_A, _STREAM_B)]
        head = f"dvora-projections/{FORMAT_VERSION}/{self.distribution}/".encode()
        return hashlib.sha256(head + np.stack(probe).astype("<f4").tobytes()).hexdigest()[:16]

    def matrices(self) -> dict[str, Tensor]:
        """The stored values as they are written into files: unscaled, as large as any layer so far has needed."""
        return {name: buffer for name, buffer in self.named_buffers() if name.startswith("stream_")}

    def check_matrices(self, matrices: Mapping[str, Tensor]) -> None:
        """Compare matrices of a file, as of `matrices`, with those made from the seed.

        Raises:
            ValueError: a name or a value differs.
        """
        for name, saved in matrices.items():
            kind, _, stream = name.partition("_")
            made = None
            if kind == "stream" and stream[:1] in ("0", "1") and saved.dim() == 2 and saved.is_floating_point():
                rows, columns = saved.shape
                made = self._generate(int(stream[:1]), rows, columns, None) if saved.numel() else None
            if made is None or not torch.equal(made, saved.to(made)):
                raise ValueError(
                    f"the saved projection matrix {name} differs from the one that seed {self.seed} and distribution "
                    f"{self.distribution!r} give; the file is damaged or was trained with other matrices"
                )

    def extra_repr(self) -> str:
        return f"seed={self.seed}, distribution={self.distribution!r}"

    def _scale(self, fan_in: int) -> float:
        return math.sqrt(2 / fan_in / _ENTRY_VARIANCE[self.distribution])

    def _like(self, stream: int, rank: int, size: int, like: Tensor) -> Tensor:
        return self._stored(stream, rank, size).to(device=like.device, dtype=like.dtype)

    def _stored(self, stream: int, rank: int, size: int) -> Tensor:
        """The unscaled values of one stream, (rank, size): a view of the largest matrix made so far."""
        # Orthogonality holds for one size only, so these cannot be cut from a larger matrix.
        name = f"stream_{stream}_{rank}x{size}" if self.distribution == "orthogonal" else f"stream_{stream}"
        stored = self._buffers.get(name)
        if stored is None or stored.shape[0] < rank or stored.shape[1] < size:
            rows, columns = (rank, size) if stored is None else map(max, stored.shape, (rank, size))
            device = None if stored is None else stored.device
            stored = self._generate(stream, rows, columns, device)
            self.register_buffer(name, stored, persistent=False)
        return stored[:rank, :size]

    def _generate(self, stream: int, rows: int, columns: int, device: torch.device | None) -> Tensor:
        with torch.inference_mode(False):
            return torch.from_numpy(_unit_rows(self.distribution, self.seed, stream, rows, columns)).to(device=device)

    def _decompose(self, rank: int, in_features: int, dtype: torch.dtype) -> None:
        with torch.inference_mode(False), torch.no_grad():
            L, Q = decompose(self.A(rank, in_features, torch.float64))
            name = f"factor_{rank}x{in_features}_{_dtype_name(dtype)}"
            self.register_buffer(name, L.to(dtype), persistent=False)
            self._bases[rank, in_features, dtype] = Q.to("cpu", dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SharedProjections":
        # Only the device is taken from `fn`, asked with an empty tensor: casts would round the matrices, and
        # `to_empty` would leave them undefined.
        for name, stored in list(self._buffers.items()):
            assert stored is not None
            device = fn(stored.new_empty(0)).device
            if not stored.is_meta or device.type == "meta":
                self._buffers[name] = stored.to(device)
            elif name.startswith("stream_"):
                rows, columns = stored.shape
                self._buffers[name] = self._generate(int(name.split("_")[1]), rows, columns, device)
            else:
                del self._buffers[name]
        return self


def decompose(A: Float[Tensor, "R I"]) -> tuple[Float[Tensor, "R K"], Float[Tensor, "K I"]]:
    """`L` and `Q` of `A = L Q` with orthonormal rows of Q, by a QR decomposition in float64, in the dtype of A."""
    q, r = torch.linalg.qr(A.double().T)
    return r.T.contiguous().to(A.dtype), q.T.contiguous().to(A.dtype)


def _unit_rows(distribution: str, seed: int, stream: int, rows: int, columns: int) -> np.ndarray:
    """The unscaled values (rows, columns), float32. Orthogonal rows beyond the columns start independent blocks."""
    if distribution != "orthogonal":
        return np.stack([_ROW[distribution](seed, stream, row, columns) for row in range(rows)])
    blocks = [
        # Each block draws from a stream of its own: rows of one stream belong to one Gram-Schmidt.
        generator.orthogonal_rows(seed, stream + 2 * (start // columns), min(columns, rows - start), columns)
        for start in range(0, rows, columns)
    ]
    return np.concatenate(blocks)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r} of type {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0 .. 2**64 - 1, got {seed}")
    return seed


def checked_distribution(distribution: str) -> Distribution:
    """The distribution, if it is known."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {distribution!r}, expected one of {', '.join(DISTRIBUTIONS)}")
    return cast(Distribution, distribution)
