"""The layer types that the PEFT method adapts, and how each holds its weight. A new type is one more row."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..shapes import Float


class LayerKind(NamedTuple):
    """How a layer type holds its weight."""

    transposed: bool
    """The weight is stored (in, out) instead of (out, in)."""

    def matrix(self, stored: Tensor) -> Float[Tensor, "O I"]:
        """The stored weight as an (out, in) view: writing to it writes to the weight."""
        return stored.T if self.transposed else stored


KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(transposed=False),
    Conv1D: LayerKind(transposed=True),
}


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a base layer, as stored."""
    weight = layer.weight
    assert isinstance(weight, Tensor), type(weight)
    return weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a base layer, if it has one."""
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor), type(bias)
    return bias


def kind_of(layer: nn.Module, name: str) -> LayerKind:
    """The kind of a base layer.

    Raises:
        TypeError: the type is not supported; the message lists those that are.
    """
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{name} belongs to a torch.nn.MultiheadAttention, which reads its weight without calling the layer, so an "
            f"adapter on it would be ignored; leave it out with exclude_modules=[{name.rpartition('.')[2]!r}]"
        )
    for layer_type, kind in KINDS.items():
        if isinstance(layer, layer_type):
            return kind
    supported = ", ".join(sorted(f"{t.__module__.partition('.')[0]}'s {t.__name__}" for t in KINDS))
    raise TypeError(f"{name} of type {type(layer).__name__} is not supported; supported layers: {supported}")
