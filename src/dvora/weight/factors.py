"""The row factors that a layer uses in one pass, and whether those that are at hand still fit.

| pass | made | used |
|---|---|---|
| training, of a whole model | for all layers of one shape at once, as the pass begins (`factor_pass`) | in that pass, and where checkpointing runs a part of it again |
| training, of a layer by itself | by the layer: the same function, for one layer | once |
| evaluation | by the layer | until a vector, the strength or the weight changes |
| trained base weight; traced | by the layer, differentiated by PyTorch | once |

What does not fit what a layer asks for is ignored and made by the layer itself: an entry can be missing or too old, but
never wrong. What fits is decided by identity, PyTorch's version counters and addresses. Engines may write to vectors
without counting it, so factors for training serve one pass only, and on the CPU factors in evaluation are also compared
with the values that they were made from, once a pass. On other devices that would synchronise: there a write through
`tensor.data` to the same memory, between two passes in evaluation, is not noticed.
"""  # noqa: E501  # a table

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engines.tensor_parallel import local
from ..method.functional import Vectors
from ..method.gain import PackedFactors, StackedFactors
from ..ops.passes import Pass, current_pass
from ..ops.tracing import grad_recorded, in_backward_pass, is_traced, saved_tensors_are_hooked
from .adapted_weight import AdaptedWeight
from .tensor_state import SameTensor, TensorVersion


class Prepared(NamedTuple):
    """The update of one weight as a function of z, for tokens and outputs of one dtype each."""

    update: Callable[[Tensor], Tensor]
    offset: Tensor | None
    """`(g - 1) bias`, where `update` does not subtract it."""
    bias: SameTensor | None
    bias_copy: Tensor | None
    """Its values, on the CPU."""

    def fits(self, bias: Tensor | None) -> bool:
        """Whether it was prepared for this bias."""
        if bias is None or self.bias is None:
            return bias is None and self.bias is None
        return self.bias.is_of(bias) and (self.bias_copy is None or torch.equal(self.bias_copy, bias))


class PassFactors(NamedTuple):
    """The factors of one layer in one pass."""

    packed: PackedFactors
    prepared: dict[tuple[torch.dtype, torch.dtype], Prepared] | None = None
    """In evaluation: what was made of them for tokens and outputs of some dtypes."""


class Asked(NamedTuple):
    """What a layer asked factors for, without keeping it alive."""

    adapted: "weakref.ref[AdaptedWeight]"
    vectors: "tuple[weakref.ref[Tensor], ...]"
    weight: "weakref.ref[Tensor] | None"


def factors_of(
    adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: Tensor | None = None
) -> PassFactors:
    """The factors of an adapter of some strength.

    Args:
        adapted: the frozen side.
        vectors: the trained ones.
        weight: as stored, or None where only the constants are in memory.
        strength: s of `W + s (W' - W)`, a tensor without dimensions; None means one.
    """
    if is_traced():
        return PassFactors(_made(adapted, vectors, weight, strength))
    if (running := current_pass()) is not None and id(adapted) not in running.asked:
        three = tuple(weakref.ref(vector) for vector in vectors)
        running.asked[id(adapted)] = Asked(weakref.ref(adapted), three, None if weight is None else weakref.ref(weight))
    if not grad_recorded() or not any(t is not None and t.requires_grad for t in (*vectors, weight, strength)):
        return _evaluated(adapted, vectors, weight, strength, running)
    # Not every optimizer's step is counted as a write.
    adapted.evaluated = None
    entry = adapted.stacked
    if entry is None or not entry.fits(adapted, vectors, weight, running):
        return PassFactors(_made(adapted, vectors, weight, strength))
    if entry.stack.measured:
        # The graph of measured rows serves one backward pass only.
        adapted.stacked = None
    return PassFactors(entry.packed if strength is None else entry.packed.weakened(strength))


class StackedEntry:
    """The factors of one layer in training, made together with those of others.

    Args:
        packed: the factors.
        stack: those of all layers.
        adapted, vectors, weight: what they were made from.
        made_for: the pass that they serve.
    """

    __slots__ = ("_trained", "_vectors", "_w", "_weight", "made_for", "packed", "stack")

    def __init__(
        self,
        packed: PackedFactors,
        stack: StackedFactors,
        adapted: AdaptedWeight,
        vectors: Vectors,
        weight: Tensor | None,
        made_for: Pass,
    ) -> None:
        self.packed, self.stack, self.made_for = packed, stack, made_for
        self._w, self._trained = adapted.w, [vector.requires_grad for vector in vectors]
        self._vectors = [SameTensor(vector) for vector in vectors]
        self._weight = None if weight is None else SameTensor(weight)

    def fits(self, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, running: Pass | None) -> bool:
        """Whether a layer may use them now."""
        # Checkpointing that is not reentrant runs a part of a pass again in the backward pass, in any thread, for the
        # values only.
        again = in_backward_pass() and saved_tensors_are_hooked()
        return (self.made_for is running or again) and self.is_of(adapted, vectors, weight)

    def is_of(self, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None) -> bool:
        """Whether they were made from these tensors as they are now."""
        return (
            adapted.w is self._w
            and _is_of(self._weight, weight)
            and not (weight is not None and weight.requires_grad)
            and all(map(SameTensor.is_of, self._vectors, vectors))
            and [vector.requires_grad for vector in vectors] == self._trained
        )


class EvaluatedEntry:
    """The factors of one layer in evaluation, and what is made of them.

    Args:
        adapted, weight: what they are made from.
        inputs: the vectors and the strength.
        make: makes the factors from inputs.
    """

    __slots__ = ("_inputs", "_versions", "_w", "_weight", "_weight_version", "compared_in", "copies", "factors")

    def __init__(
        self,
        adapted: AdaptedWeight,
        inputs: Sequence[Tensor],
        weight: Tensor | None,
        make: Callable[[Sequence[Tensor]], PackedFactors],
    ) -> None:
        # Before anything is read, since another thread may write to it meanwhile.
        self._inputs = [SameTensor(tensor) for tensor in inputs]
        self._weight = None if weight is None else SameTensor(weight)
        self._weight_version = None if weight is None else TensorVersion.of(local(weight))
        self.copies = [tensor.detach().clone() for tensor in inputs] if all(t.is_cpu for t in inputs) else None
        """Values of the inputs, on the CPU."""
        # A shard is another tensor in every pass.
        self._versions = [TensorVersion.of(tensor) for tensor in inputs] if self.copies is None else None
        self.compared_in: Pass | None = None
        """The pass in which the inputs were compared with the copies."""
        self.factors = PassFactors(make(inputs if self.copies is None else self.copies), {})
        self._w = adapted.w

    def fits(
        self, adapted: AdaptedWeight, inputs: Sequence[Tensor], weight: Tensor | None, running: Pass | None
    ) -> bool:
        """Whether nothing has changed."""
        if adapted.w is not self._w or len(inputs) != len(self._inputs) or not self._has_weight(weight):
            return False
        same = all(map(SameTensor.is_of, self._inputs, inputs))
        if self.copies is None:
            return same or (self._versions is not None and all(map(TensorVersion.is_of, self._versions, inputs)))
        if same and running is not None and self.compared_in is running:
            return True
        if not all(map(_equal, inputs, self.copies)):
            return False
        self.compared_in = running
        return True

    def is_of_same(self, vectors: Sequence[Tensor]) -> bool:
        """Whether it was made from these vectors and nothing else, whatever is in them now."""
        return len(vectors) == len(self._inputs) and all(map(SameTensor.is_same, self._inputs, vectors))

    def _has_weight(self, weight: Tensor | None) -> bool:
        if _is_of(self._weight, weight):
            return True
        known = self._weight_version
        return weight is not None and known is not None and known.is_of(local(weight))


def _is_of(known: SameTensor | None, tensor: Tensor | None) -> bool:
    return known is None if tensor is None else known is not None and known.is_of(tensor)


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == copy.dtype and torch.equal(tensor, copy)


def _evaluated(
    adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: Tensor | None, running: Pass | None
) -> PassFactors:
    inputs = vectors if strength is None else (*vectors, strength)
    entry: EvaluatedEntry | None = adapted.evaluated
    if entry is not None and entry.fits(adapted, inputs, weight, running):
        return entry.factors

    def make(read: Sequence[Tensor]) -> PackedFactors:
        return _made(adapted, Vectors(*read[:3]), weight, *read[3:])

    # Inference tensors could not be used in a later pass that trains something else.
    with torch.inference_mode(False), torch.no_grad():
        entry = EvaluatedEntry(adapted, inputs, weight, make)
    adapted.evaluated = entry if entry.fits(adapted, inputs, weight, running) else None
    return entry.factors


def _made(
    adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: Tensor | None = None
) -> PackedFactors:
    """The factors of one layer, made now."""
    packed = adapted.packed_factors(vectors, weight)
    return packed if strength is None else packed.weakened(strength)
