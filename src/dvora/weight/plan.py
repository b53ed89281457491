"""Cached plans of a linear layer's forward: with few tokens, looking up operands takes longer than using them.

A layer makes a plan in one pass of a model and follows it in later ones, while all tensors that outputs depend on are
those of the plan, by identity, address and version. In training the vectors may change, for factors are asked for in
every pass; in evaluation they may not, and on the CPU their values are compared too, once a pass.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..engines.tensor_parallel import is_dtensor
from ..engines.zero3 import is_partitioned
from ..method.functional import Vectors
from ..ops.annotations import Float
from ..ops.passes import Pass
from .adapted_weight import AdaptedWeight
from .factors import EvaluatedEntry
from .linear import Update, adapted_linear
from .prepared import PreparedUpdate
from .tensor_state import is_unchanged, same_or_none
from .updated_linear import takes_updated_weight, updated_linear


class Operands(NamedTuple):
    """The tensors of a layer that its outputs depend on, besides its inputs."""

    magnitude: Tensor
    lambda_b: Tensor
    lambda_d: Tensor
    strength: Tensor
    weight: Tensor | None
    bias: Tensor | None


def is_held(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is whole and on the device, and no engine takes it away between passes."""
    return tensor.device == device and not is_dtensor(tensor) and not is_partitioned(tensor)


class EvaluationPlan:
    """What one adapter does to the outputs of one layer in evaluation, while nothing changes.

    Args:
        adapted: the frozen side of a whole weight in memory.
        entry: its factors.
        operands: as they are now.
        x: inputs; the plan is for others of their width, dtype and device.
    """

    __slots__ = ("_adapted", "_asked", "_operands", "prepared")

    def __init__(
        self, adapted: AdaptedWeight, entry: EvaluatedEntry, operands: Operands, x: Float[Tensor, "*T I"]
    ) -> None:
        self._operands = [same_or_none(tensor) for tensor in operands]
        # Neither the adapter nor the entry itself, since they keep the plan.
        self._adapted, self._asked = id(adapted), entry.asked
        self.prepared = PreparedUpdate(Update(adapted, None, entry.factors, adapted.matrices), x)

    def keep(
        self, adapted: AdaptedWeight, entry: EvaluatedEntry, is_whole: bool, operands: Operands, running: Pass
    ) -> None:
        """Keep the plan with its factors, unless they have changed before the operands were looked at.

        Args:
            adapted, entry, operands: as before.
            is_whole: whether the factors are those of a strength of one.
            running: the pass.
        """
        inputs = operands[:3] if is_whole else operands[:4]
        if adapted.small_rows(operands.bias) is not None or not entry.fits(adapted, inputs, operands.weight, running):
            return
        # Factors also fit other vectors of equal values, which later passes do not compare.
        if entry.is_of_same(inputs):
            entry.plan = self

    def is_of(self, operands: Operands, x: Tensor) -> bool:
        """Whether another plan made from these would be the same, with the same factors."""
        return x.dtype is self.prepared.dtype and all(map(is_unchanged, self._operands, operands))

    def serves(self, entry: EvaluatedEntry, operands: Operands, x: Tensor, running: Pass) -> bool:
        """Whether the layer's outputs are still those of the plan, in a pass without gradients.

        This runs for every layer and token, when nothing of it is in the processor's cache: it calls little.

        Args:
            entry: which keeps the plan.
            operands, x: as they are now.
            running: the pass.
        """
        return (
            (entry.compared_in is running or entry.copies is None)
            and self.is_of(operands, x)
            and not torch._C._is_any_autocast_enabled()
            and not torch._C._are_functorch_transforms_active()
        )

    def outputs(self, x: Float[Tensor, "*T I"], base_layer: nn.Module, running: Pass) -> Float[Tensor, "*T O"]:
        """The layer's outputs, in a pass that the plan serves."""
        base_output: Tensor = base_layer(x)
        running.asked[self._adapted] = self._asked
        return self.prepared.outputs(x, base_output, base_layer._parameters["bias"], running)


class TrainingPlan:
    """What one adapter of strength one does to the outputs of one layer in training, whatever is in its vectors.

    Args:
        adapted: the frozen side of a whole weight in memory.
        operands: as they are now.
    """

    __slots__ = ("_adapted", "_dtype", "_operands")

    def __init__(self, adapted: AdaptedWeight, operands: Operands) -> None:
        # Weakly, since it keeps the plan.
        self._adapted, self._dtype = weakref.ref(adapted), operands.magnitude.dtype
        self._operands = [same_or_none(tensor) for tensor in operands[3:]]

    def keep(self, adapted: AdaptedWeight, is_whole: bool, operands: Operands) -> None:
        """Keep the plan, unless the operands were changed before they were looked at; arguments as above."""
        if is_whole and adapted.small_rows(operands.bias) is None:
            adapted.kept.training_plan = self

    def serves(self, operands: Operands) -> bool:
        """Whether the layer's outputs are still those of the plan."""
        return all(map(is_unchanged, self._operands, operands[3:])) and operands.magnitude.dtype is self._dtype

    def outputs(self, operands: Operands, x: Float[Tensor, "*T I"], base_layer: nn.Module) -> Float[Tensor, "*T O"]:
        """The layer's outputs, where the plan serves."""
        adapted = self._adapted()
        assert adapted is not None
        update = Update.of(adapted, Vectors(*operands[:3]), operands.weight)
        if takes_updated_weight(base_layer, x, update.matrices):
            assert isinstance(base_layer, nn.Linear)
            return updated_linear(update, base_layer, x)
        return adapted_linear(update, base_layer(x), x, operands.bias)
