"""HyperAdapt for serving: the scales of a layer's rows and columns, gathered by row of a batch; no product.

Dimensions: N adapters, B rows of a batch, T tokens a row, I in, O out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.speed.workloads import random


class Scales(NamedTuple):
    """Those of one layer for all adapters."""

    rows: Tensor
    """(N, O)."""
    columns: Tensor
    """(N, I)."""


class GatheredScales:
    """Many adapters on a frozen model, by forward hooks; outside of `rows` the model is the base.

    Args:
        model: the frozen base; its layers get hooks.
        scales: by the names of layers, whose inputs are (B, T, I).
    """

    def __init__(self, model: nn.Module, scales: Mapping[str, Scales]) -> None:
        self.tables = dict(scales)
        self.index: Tensor | None = None
        self.gathered: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        for name in scales:
            layer = model.get_submodule(name)
            layer.register_forward_pre_hook(partial(self._scale_inputs, name))
            layer.register_forward_hook(partial(self._scale_outputs, name))

    @contextmanager
    def rows(self, adapters: Sequence[int]) -> Iterator[None]:
        """Use these adapters, one a row of the batch."""
        # One adapter for all rows needs no gathering.
        self.index = torch.tensor(adapters if len(set(adapters)) > 1 else adapters[:1])
        try:
            yield
        finally:
            self.index, self.gathered = None, {}

    def _scale_inputs(self, name: str, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.index is None:
            return None
        if name not in self.gathered:
            rows, columns = (table.index_select(0, self.index)[:, None] for table in self.tables[name])
            # `rows (y - bias) + bias` in one operation.
            bias = None if layer.bias is None else layer.bias * (1 - rows)
            self.gathered[name] = rows, columns, bias
        return (inputs[0] * self.gathered[name][1],)

    def _scale_outputs(self, name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self.index is None:
            return None
        rows, _, bias = self.gathered[name]
        return output.mul_(rows) if bias is None else torch.addcmul(bias, output, rows, out=output)


def random_scales(model: nn.Module, targets: tuple[str, ...], count: int, dtype: torch.dtype) -> dict[str, Scales]:
    """The scales of that many adapters for a model, by the names of its layers.

    Args:
        model: the frozen base.
        targets: what the names of adapted layers end in.
        count, dtype: of the scales.
    """
    return {
        # As large as after some training.
        name: Scales(
            *(
                1 + 0.01 * random(count, size, dtype=dtype, seed=number)
                for size in (layer.out_features, layer.in_features)
            )
        )
        for number, (name, layer) in enumerate(model.named_modules())
        if isinstance(layer, nn.Linear) and name.endswith(targets)
    }
