"""Shard: which inputs or outputs of a weight one process holds under tensor parallelism."""

from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """`start` to `stop` of `total` features."""

    start: int
    stop: int
    total: int

    def of(self, tensor: Tensor) -> Tensor:
        """This process's values along the last dimension, as a view."""
        return tensor[..., self.start : self.stop]
