"""The exact matrices that PEFT's VeRA draws, for adapters converted from it.

PEFT draws both matrices from torch's generator, in the sizes of the largest layer, and slices them for other layers
without another scale. So the sizes are part of the distribution's name. Torch does not promise the same bits on every
machine, so the fingerprint hashes all values.

Dimensions: I in, O out, R rank, each of the largest layer.
"""

import hashlib
import math
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tensors import Float
from .dense import Matrices, Side

_NAME = re.compile(r"peft_vera\(r=([1-9]\d{0,4}), in=([1-9]\d{0,7}), out=([1-9]\d{0,7})\)")

MAX_VALUES = 2**28
"""Of both matrices, so that a damaged setting cannot draw without end."""


class VeraSizes(NamedTuple):
    """R, I and O of the matrices as drawn."""

    rank: int
    in_features: int
    out_features: int

    @property
    def distribution(self) -> str:
        """The name that configurations use."""
        return f"peft_vera(r={self.rank}, in={self.in_features}, out={self.out_features})"


def vera_sizes(distribution: str) -> VeraSizes | None:
    """The sizes in the name of a distribution; None for any other distribution, and above `MAX_VALUES`."""
    if (match := _NAME.fullmatch(distribution)) is None:
        return None
    sizes = VeraSizes(*map(int, match.groups()))
    return sizes if sizes.rank * (sizes.in_features + sizes.out_features) <= MAX_VALUES else None


def drawn(seed: int, sizes: VeraSizes) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """A and B as `peft.tuners.vera` draws them: Kaiming uniform, one after the other."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rank, in_features, out_features = sizes
    return _uniform((rank, in_features), generator), _uniform((out_features, rank), generator)


class VeraMatrices(Matrices):
    """A and B of PEFT's VeRA.

    Args:
        seed: its `projection_prng_key`.
        sizes: of the matrices as drawn, and so the largest that a layer can have.
    """

    def __init__(self, seed: int, sizes: VeraSizes) -> None:
        super().__init__(seed)
        self.sizes = sizes

    def fingerprint_values(self) -> np.ndarray:
        """A hash of all values: a few would not show whether this machine draws the same ones."""
        return np.frombuffer(_digest(self.seed, self.sizes), dtype=np.uint8)

    def _unscaled(self, side: Side, rank: int, size: int) -> np.ndarray:
        most, largest = self.sizes.rank, self.sizes.in_features if side == "A" else self.sizes.out_features
        if rank > most or size > largest:
            raise ValueError(
                f"projection_init={self.sizes.distribution!r} has matrices of rank {most} for at most {largest} "
                f"{'inputs' if side == 'A' else 'outputs'}; this layer needs rank {rank} and {size}"
            )
        A, B = drawn(self.seed, self.sizes)
        return np.ascontiguousarray((A if side == "A" else B.T)[:rank, :size])

    def _scale(self, fan_in: int) -> float:
        return 1.0  # drawn with their scale


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    # In PEFT's order of operations: another would round to other bits.
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


@lru_cache(maxsize=8)
def _digest(seed: int, sizes: VeraSizes) -> bytes:
    digest = hashlib.sha256()
    for matrix in drawn(seed, sizes):
        # Without a copy on little-endian machines: it would double the memory.
        digest.update(matrix.numpy().astype("<f4", copy=False).ravel().data)
    return digest.digest()
