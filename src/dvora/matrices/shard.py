"""Shard: which inputs or outputs of a weight one process holds, where tensor parallelism divides them."""

from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """`start` to `stop` of `total` features."""

    start: int
    stop: int
    total: int

    def of(self, tensor: Tensor) -> Tensor:
        """The shard's values along the last dimension; a view."""
        return tensor[..., self.start : self.stop]
