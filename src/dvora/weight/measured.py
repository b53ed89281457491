"""MeasuredWeight: whether a weight is still the one that constants were made from.

An engine that frees weights between passes and gathers them again (FSDP2) shows the same tensor, mostly at another
address. It does not count that as a change, nor a change of the parts that it gathers from: there the values themselves
are compared, by two passes over the weight in place of the constants' own product.
"""

import torch
from torch import Tensor

from ..ops.annotations import Float
from ..ops.dtypes import norm_dtype
from .evaluated import State, version_of


class MeasuredWeight:
    """The state of a weight, and from its second gathering on what tells its values.

    Args:
        weight: as constants were made from it.
        gathered_again: whether it had been freed and gathered before.
    """

    def __init__(self, weight: Tensor, gathered_again: bool = False) -> None:
        self._state = State.of(weight)
        self._sample = _sample(weight) if gathered_again else None

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is in the same state."""
        return self._state.is_of(weight)

    def was_written_to(self, weight: Tensor) -> bool:
        """Whether PyTorch has counted a write since."""
        return self._state.version != version_of(weight)

    def was_gathered_again(self, weight: Tensor) -> bool:
        """Whether the weight is the same tensor, perhaps with other values."""
        return self._state.is_of_same(weight)

    def has_values_of(self, weight: Tensor) -> bool:
        """Whether a weight that was gathered again has the values that it had; if so, its state is the new one."""
        if self._sample is None or not torch.equal(self._sample, _sample(weight)):
            return False
        self._state = State.of(weight)
        return True


@torch.no_grad()
def _sample(weight: Tensor) -> Float[Tensor, "2 O"]:
    """The norm of every row, and its product with one fixed vector, which tells signs and places."""
    rows = weight.detach().flatten(1)
    # Irrational steps: no two columns have the same weight, whatever their number.
    fixed = torch.frac(torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32) * 0.6180339887)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=norm_dtype(rows.dtype))
    return torch.stack([norms, (rows @ (fixed - 0.5).to(rows.dtype)).to(norms.dtype)])
