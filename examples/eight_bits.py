"""A vector in 8 bits, for links where bytes count: a quarter of float32.

What rounding leaves of one message goes into the next one (error feedback), so that nothing is lost over the rounds.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Values with one scale."""


class EightBits(NamedTuple):
    """A rounded vector: every value is off by at most the largest of its block divided by 254."""

    values: Tensor
    """int8."""
    scales: Tensor
    """float32, one a block."""

    @classmethod
    def of(cls, vector: Tensor) -> "EightBits":
        """Round a vector of float32."""
        blocks = pad(vector, (0, -len(vector) % BLOCK)).view(-1, BLOCK)
        scales = (blocks.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return cls((blocks / scales[:, None]).round().to(torch.int8).flatten()[: len(vector)], scales)

    def vector(self) -> Tensor:
        """In float32 again."""
        return self.values * self.scales.repeat_interleave(BLOCK)[: len(self.values)]


def rounded(change: Tensor, left: Tensor) -> tuple[EightBits, Tensor]:
    """What is sent of a change, and what is left of it for the next one.

    Args:
        change: float32.
        left: of the change before; zeros at first.
    """
    sent = EightBits.of(change + left)
    return sent, change + left - sent.vector()
