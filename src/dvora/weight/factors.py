"""The row factors of a layer, and their caches: for one pass in training, until something changes in evaluation.

| pass | made by | used |
|---|---|---|
| training, of a whole model | `factor_pass`, for all layers of one shape | in it, and where a checkpoint repeats it |
| training, of a layer by itself | the layer: the same function, for one layer | once |
| evaluation | the layer | until a vector, the strength or the weight changes |
| trained base weight; traced | the layer, differentiated by PyTorch | once |

What does not fit what a layer asks for is ignored and made by the layer itself: an entry can be missing or too old, but
never wrong. What fits is decided by identity, PyTorch's version counters and addresses. Engines may write to vectors
without counting it, so factors for training serve one pass only, and on the CPU factors in evaluation are also compared
with the values that they were made from, once a pass. On other devices that would synchronise: there a write through
`tensor.data` to the same memory, between two passes in evaluation, is not noticed.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.tensor_parallel import local
from ..matrices.interface import Matrices
from ..method.functional import Vectors
from ..method.gain import StackedFactors
from ..method.norm import FrozenNorm
from ..method.packed_factors import PackedFactors
from ..ops.annotations import Float
from ..ops.passes import Pass, current_pass
from ..ops.tracing import grad_recorded, in_backward_pass, is_traced, saved_tensors_are_hooked
from .adapted_weight import AdaptedWeight
from .tensor_state import SameTensor, TensorVersion, is_unchanged, same_or_none

_is_cpu = attrgetter("is_cpu")

_TOGETHER = 8
"""Adapters whose vectors are compared together: few enough for the processor's cache."""


class PassFactors(NamedTuple):
    """The factors of one layer in one pass."""

    packed: PackedFactors
    prepared: dict[torch.dtype, Callable[[Tensor, Tensor | None], Tensor]] | None = None
    """In evaluation: `Matrices.prepared_update` for tokens of a dtype."""

    def added(self, matrices: Matrices, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The function that adds the update for tokens of a dtype, kept with factors that are kept."""
        known = None if self.prepared is None else self.prepared.get(dtype)
        if known is not None:
            return known
        add = matrices.prepared_update(self.packed.lambda_d.detach(), self.packed.trained[1].detach(), dtype)
        if self.prepared is not None:
            self.prepared[dtype] = add
        return add


class Asked(NamedTuple):
    """What a layer asked factors for, without keeping it alive."""

    adapted: "weakref.ref[AdaptedWeight]"
    vectors: "tuple[weakref.ref[Tensor], ...]"
    weight: "weakref.ref[Tensor] | None"

    @classmethod
    def of(cls, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None) -> "Asked":
        """Of these."""
        three = tuple(weakref.ref(vector) for vector in vectors)
        return cls(weakref.ref(adapted), three, None if weight is None else weakref.ref(weight))


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
        return PassFactors(_made(adapted, vectors, weight, strength)[0])
    running = current_pass()
    if grad_recorded() and any(t is not None and t.requires_grad for t in (*vectors, weight, strength)):
        # Not every optimizer's step is counted as a write.
        adapted.kept.evaluated = None
        entry = adapted.kept.stacked
        fits = entry is not None and entry.fits(adapted, vectors, weight, running)
        if running is not None and id(adapted) not in running.asked:
            running.asked[id(adapted)] = entry.asked if fits else Asked.of(adapted, vectors, weight)
        if not fits:
            return PassFactors(_made(adapted, vectors, weight, strength)[0])
        if entry.stack.measured:
            # The graph of measured rows serves one backward pass only.
            adapted.kept.stacked = None
        return PassFactors(entry.packed if strength is None else entry.packed.weakened(strength))
    return _evaluated(adapted, vectors, weight, strength, running)


class StackedEntry:
    """The factors of one layer in training, made together with those of others.

    Made before the factors, so that what is written while they are made is noticed.

    Args:
        asked: what the factors are made for.
        shape: what the layers of a stack have in common.
        vectors, weight: what they are made from.
        made_for: the pass that they serve.
    """

    __slots__ = (
        "_places",
        "_trained",
        "_vectors",
        "_versions",
        "_weight",
        "asked",
        "made_for",
        "norm",
        "packed",
        "shape",
        "stack",
    )

    packed: PackedFactors
    norm: FrozenNorm
    stack: StackedFactors
    """The factors of all layers."""

    def __init__(
        self, asked: Asked, shape: tuple[object, ...], vectors: Vectors, weight: SameTensor | None, made_for: Pass
    ) -> None:
        self.asked, self.shape, self.made_for = asked, shape, made_for
        self._vectors, self._weight = vectors, weight
        m, b, d = vectors
        self._versions = m._version, b._version, d._version
        self._places = [_place(vector) for vector in vectors]
        self._trained = m.requires_grad, b.requires_grad, d.requires_grad

    def renewed(self, made_for: Pass) -> "StackedEntry":
        """One for another pass, with the values that the same vectors have now."""
        entry = StackedEntry(self.asked, self.shape, self._vectors, self._weight, made_for)
        entry.norm = self.norm
        return entry

    def fits(self, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, running: Pass | None) -> bool:
        """Whether a layer may use them now."""
        # Checkpointing that is not reentrant runs a part of a pass again in the backward pass, in any thread, for the
        # values only.
        if self.made_for is not running and not (in_backward_pass() and saved_tensors_are_hooked()):
            return False
        return self.has_versions_of(vectors) and self.is_of(adapted, vectors, weight)

    def has_versions_of(self, vectors: Vectors) -> bool:
        """Whether nothing has been written to the vectors, as far as PyTorch counts it."""
        m, b, d = vectors
        return (m._version, b._version, d._version) == self._versions

    def is_of(self, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None) -> bool:
        """Whether they were made from these tensors, whatever has been written to the vectors since."""
        (m, b, d), (known_m, known_b, known_d) = vectors, self._vectors
        return (
            m is known_m
            and b is known_b
            and d is known_d
            and [_place(m), _place(b), _place(d)] == self._places
            and (m.requires_grad, b.requires_grad, d.requires_grad) == self._trained
            and adapted.w is self.norm.w
            and adapted.C is self.norm.C
            and is_unchanged(self._weight, weight)
            and (weight is None or not weight.requires_grad)
        )


def _place(vector: Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    """Where its values are: `tensor.data` may be assigned without another version."""
    return vector.data_ptr(), vector.stride(), vector.dtype


class EvaluatedEntry:
    """The factors of one layer in evaluation, and what is made of them.

    Made before the factors, so that what is written while they are made is noticed.

    Args:
        asked: what the factors are made for.
        inputs: the vectors and the strength.
        copies: their values as one tensor, on the CPU; None elsewhere.
        weight: as stored, or None.
        known_weight: what another entry knows of the same weight, or None.
    """

    __slots__ = (
        "_versions",
        "_weight_version",
        "asked",
        "compared_in",
        "copies",
        "factors",
        "inputs",
        "plan",
        "row",
        "w",
        "weight",
    )

    factors: PassFactors
    row: Tensor
    """The same factors as one tensor (`PackedFactors.row`)."""
    w: Tensor
    """The norms that they are made with."""

    def __init__(
        self,
        asked: Asked,
        inputs: Sequence[Tensor],
        copies: Tensor | None,
        weight: Tensor | None,
        known_weight: SameTensor | None = None,
    ) -> None:
        self.asked, self.copies = asked, copies
        self.plan: Any = None
        """The layer's `EvaluationPlan` with these factors."""
        self.compared_in: Pass | None = None
        """The pass in which the vectors were compared with the copies."""
        self.inputs = [SameTensor(tensor) for tensor in inputs]
        self.weight = known_weight if is_unchanged(known_weight, weight) else same_or_none(weight)
        self._weight_version = None if weight is None else TensorVersion.of(local(weight))
        # A shard is another tensor in every pass.
        self._versions = [TensorVersion.of(tensor) for tensor in inputs] if copies is None else None

    def fits(
        self, adapted: AdaptedWeight, inputs: Sequence[Tensor], weight: Tensor | None, running: Pass | None
    ) -> bool:
        """Whether nothing has changed."""
        if not (self.is_for(adapted, inputs) and self.has_weight(weight)):
            return False
        if self.copies is None:
            same = all(map(SameTensor.is_of, self.inputs, inputs))
            return same or (self._versions is not None and all(map(TensorVersion.is_of, self._versions, inputs)))
        if running is not None and self.compared_in is running and all(map(SameTensor.is_of, self.inputs, inputs)):
            return True
        if not have_values(inputs, self.copies):
            return False
        self.compared_in = running
        return True

    def is_for(self, adapted: AdaptedWeight, inputs: Sequence[Tensor]) -> bool:
        """Whether nothing has changed but perhaps the inputs and the weight."""
        # Not as an attribute, which modules take as long to look up as a small product takes.
        return adapted._buffers["w"] is self.w and len(inputs) == len(self.inputs)

    def is_of_same(self, inputs: Sequence[Tensor]) -> bool:
        """Whether it was made from these tensors and nothing else, whatever is in them now."""
        return len(inputs) == len(self.inputs) and all(map(SameTensor.is_same, self.inputs, inputs))

    def has_inputs(self) -> bool:
        """Whether all tensors that it was made from still exist."""
        return all(known.tensor() is not None for known in self.inputs)

    def has_weight(self, weight: Tensor | None) -> bool:
        """Whether it was made with this weight."""
        if is_unchanged(self.weight, weight):
            return True
        known = self._weight_version
        return weight is not None and known is not None and known.is_of(local(weight))


def have_values(inputs: Sequence[Tensor], copies: Tensor) -> bool:
    """Whether vectors and strengths have these values, one after another, on the CPU."""
    if not all(map(_is_cpu, inputs)):
        return False
    now = joined_values(inputs)
    return now.dtype == copies.dtype and torch.equal(now, copies)


def joined_values(inputs: Sequence[Tensor]) -> Tensor:
    """Vectors, and strengths, which have no dimension, as one tensor; of several dtypes in the widest."""
    return torch.cat([tensor if tensor.dim() else tensor[None] for tensor in inputs])


def factor_rows(
    weights: Sequence[AdaptedWeight], inputs: Sequence[Sequence[Tensor]], weight: Tensor | None
) -> Float[Tensor, "N F"]:
    """The factors of many adapters of one layer without gradients, as rows of one matrix (`PackedFactors.row`).

    On the CPU their vectors are compared at once with those that kept factors were made from: of thousands of adapters
    each may be asked for seldom, and what is looked up for one is in no processor's cache.

    Args:
        weights: the frozen sides.
        inputs: the vectors of each, and its strength unless that is one.
        weight: as for `factors_of`.
    """
    entries = _all_fit(weights, inputs, weight)
    if entries is None:
        entries, known = [], None
        for adapted, own in zip(weights, inputs, strict=True):
            entries.append(_entry_for(adapted, own, weight, None, known))
            known = entries[-1].weight
    return torch.stack([entry.row for entry in entries])


def _all_fit(
    weights: Sequence[AdaptedWeight], inputs: Sequence[Sequence[Tensor]], weight: Tensor | None
) -> list[EvaluatedEntry] | None:
    """The kept factors of all adapters, if nothing has changed."""
    entries, copies, known = list[EvaluatedEntry](), list[Tensor](), None
    for adapted, own in zip(weights, inputs, strict=True):
        entry: EvaluatedEntry | None = adapted.kept.evaluated
        if entry is None or entry.copies is None or not entry.is_for(adapted, own):
            return None
        if known is None or entry.weight is not known:
            if not entry.has_weight(weight):
                return None
            known = entry.weight
        entries.append(entry)
        copies.append(entry.copies)
    for start in range(0, len(entries), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        if not have_values(list(chain.from_iterable(inputs[some])), torch.cat(copies[some])):
            return None
    return entries


def _entry_for(
    adapted: AdaptedWeight,
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    running: Pass | None,
    known_weight: SameTensor | None = None,
) -> EvaluatedEntry:
    """The kept factors if they fit, or new ones, which are kept."""
    entry: EvaluatedEntry | None = adapted.kept.evaluated
    if entry is None or not entry.fits(adapted, inputs, weight, running):
        entry = _new_entry(adapted, inputs, weight, known_weight)
        adapted.kept.evaluated = entry if entry.fits(adapted, inputs, weight, running) else None
    return entry


def _evaluated(
    adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: Tensor | None, running: Pass | None
) -> PassFactors:
    entry = _entry_for(adapted, vectors if strength is None else (*vectors, strength), weight, running)
    if running is not None:
        running.asked.setdefault(id(adapted), entry.asked)
    return entry.factors


# Inference tensors could not be used in a later pass that trains something else.
@torch.inference_mode(False)
@torch.no_grad()
def _new_entry(
    adapted: AdaptedWeight, inputs: Sequence[Tensor], weight: Tensor | None, known_weight: SameTensor | None
) -> EvaluatedEntry:
    # Copy before computing, and compute from the copies: another thread may write to the vectors meanwhile.
    copies = joined_values(inputs) if all(map(_is_cpu, inputs)) else None
    entry = EvaluatedEntry(Asked.of(adapted, Vectors(*inputs[:3]), weight), inputs, copies, weight, known_weight)
    if copies is None:
        magnitude, lambda_b, lambda_d, *strength = inputs
    else:
        magnitude, lambda_b, lambda_d, *strength = copies.split([tensor.numel() for tensor in inputs])
    packed, entry.w = _made(adapted, Vectors(magnitude, lambda_b, lambda_d), weight, *strength)
    entry.row = packed.row
    trained, lambda_d = entry.row.split([packed.trained.numel(), len(lambda_d)])
    entry.factors = PassFactors(PackedFactors(trained.view_as(packed.trained), packed.constant, lambda_d), {})
    return entry


def _made(
    adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, strength: Tensor | None = None
) -> tuple[PackedFactors, Tensor]:
    """The factors of one layer, made now, and the norms that they were made with."""
    packed, w = adapted.packed_factors(vectors, weight)
    return packed if strength is None else packed.weakened(strength), w
