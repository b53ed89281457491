"""SharedProjections: the frozen random matrices A and B of DVoRA, held once and shared by all layers of all sizes.

Dimensions: I in, O out, R rank.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..tensors import Float
from .dense import Matrices, Shard
from .vera import VeraMatrices, vera_sizes

__all__ = ["DISTRIBUTION", "FORMAT_VERSION", "Matrices", "Shard", "SharedProjections", "checked_distribution"]

FORMAT_VERSION = 1
"""Version of the map from (seed, stream, row, column) to a value. A change of any value needs a new number."""

DISTRIBUTION = "kaiming_uniform"
"""That for layers of any size. "peft_vera(r=R, in=I, out=O)" names the matrices of one adapter of PEFT's VeRA."""


class SharedProjections(nn.Module):
    """The frozen `A` and `B` of one seed and distribution, for every layer size and rank, made on demand.

    One object serves a whole model. Its matrices are constants, not buffers: they are on every device where they are
    used, ignore casts, are no part of state dicts, and are made again from the seed where a copy or a file lacks them.

    Args:
        seed: names the matrices, 0 <= seed < 2**64.
        distribution: "kaiming_uniform", independent values, reproducible bit for bit; or, of an adapter that comes from
            PEFT's VeRA, "peft_vera(r=R, in=I, out=O)", torch's values for a seed.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is out of range, or `distribution` is unknown.
    """

    def __init__(self, seed: int = 0, distribution: str = DISTRIBUTION) -> None:
        super().__init__()
        self.seed = _checked_seed(seed)
        self.distribution = checked_distribution(distribution)
        self.impl = _matrices(seed, self.distribution)

    def reserve(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> None:
        """Make now what passes of a layer in `dtype` and its norms need."""
        self.impl.reserve(rank, in_features, out_features, dtype)

    def A(
        self,
        rank: int,
        in_features: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Float[Tensor, "R I"]:
        """The dense matrix `A`, made now."""
        return self.impl.values("A", rank, in_features, dtype, device or torch.device("cpu"))

    def B(
        self,
        rank: int,
        out_features: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Float[Tensor, "O R"]:
        """The dense matrix `B`, made now."""
        return self.impl.values("B", rank, out_features, dtype, device or torch.device("cpu")).T

    def fingerprint(self) -> str:
        """A short hash of format version, distribution and some values; equal hashes mean equal matrices."""
        return _fingerprint(self.seed, self.distribution)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self.seed}, distribution={self.distribution!r})"


def checked_distribution(distribution: str) -> str:
    """The distribution, if it is known."""
    is_known = distribution == DISTRIBUTION or (isinstance(distribution, str) and vera_sizes(distribution) is not None)
    if not is_known:
        raise ValueError(
            f"unknown distribution {distribution!r}, expected {DISTRIBUTION!r}; load an adapter with the version that "
            "saved it"
        )
    return distribution


def _matrices(seed: int, distribution: str) -> Matrices:
    sizes = vera_sizes(distribution)
    return Matrices(seed) if sizes is None else VeraMatrices(seed, sizes)


@lru_cache(maxsize=64)
def _fingerprint(seed: int, distribution: str) -> str:
    head = f"dvora-projections/{FORMAT_VERSION}/{distribution}/".encode()
    values = _matrices(seed, distribution).fingerprint_values().astype("<f4").tobytes()
    return hashlib.sha256(head + values).hexdigest()[:16]


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r} of type {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0 .. 2**64 - 1, got {seed}")
    return seed
