"""The row factors of all layers of a model, made together when a forward pass of the model begins.

A `FactorPass` knows the layers from the pass before: those that asked for factors in the last one get theirs at the
start of the next. So nothing has to be said to it when layers are added, replaced, frozen, moved or deleted.

Left to the layers themselves are weights that are trained, sharded or not in memory, and vectors that an engine shards
or gathers (DTensor, FSDP, ZeRO-3).
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..engines.fsdp2 import may_be_gathered
from ..engines.tensor_parallel import is_dtensor
from ..engines.zero3 import is_in_memory, is_partitioned
from ..method.functional import Vectors
from ..method.gain import StackedFactors, row_factors
from ..method.norm import joined
from ..ops.passes import Pass, enter, leave
from ..ops.tracing import grad_recorded, is_traced
from .adapted_weight import AdaptedWeight
from .factors import Asked, EvaluatedEntry, StackedEntry, have_values
from .tensor_state import SameTensor, same_or_none


class FactorPass:
    """Makes the factors of one model's layers; `begin` and `end` are hooks around its forward."""

    def __init__(self) -> None:
        self._last: dict[bool, Pass] = {}
        self._compared: _Compared | None = None

    def begin(self, *_: object) -> None:
        """Enter a pass, in this thread, and make the factors for it."""
        if is_traced():
            return
        recorded = grad_recorded()
        last, begun = self._last.get(recorded), Pass()
        self._last[recorded] = begun
        asked = [] if last is None else list(last.asked.values())
        if recorded:
            alive = [(each, layer) for each in asked if (layer := _alive(each)) is not None]
            _make([layer for _, layer in alive if layer.is_trained()], begun)
            asked = [each for each, layer in alive if not layer.is_trained()]
        self._compare(asked, begun)
        enter(self, begun)

    def end(self, *_: object) -> None:
        """Leave the pass."""
        if not is_traced():
            leave(self)

    @torch.no_grad()
    def _compare(self, asked: list[object], begun: Pass) -> None:
        """Compare all vectors on the CPU with the values that the factors in evaluation were made from, at once."""
        if not asked:
            # Of adapters that may be gone.
            self._compared = None
            return
        known = self._compared
        if known is None or not known.is_of(asked):
            known = self._compared = _Compared.of(asked)
        if known is not None and known.is_unchanged():
            for entry in known.entries:
                entry.compared_in = begun

    def __reduce__(self) -> "tuple[type[FactorPass], tuple[()]]":
        return FactorPass, ()


class _Compared(NamedTuple):
    """The factors of the layers that asked in the last pass, and the values that they were made from, on the CPU."""

    asked: list[object]
    entries: list[EvaluatedEntry]
    inputs: list[SameTensor]
    copies: Tensor

    @classmethod
    def of(cls, asked: list[object]) -> "_Compared | None":
        """None if there are none: layers compare what is left out themselves."""
        layers = [layer for each in asked if (layer := _alive(each)) is not None]
        kept: list[EvaluatedEntry | None] = [layer.adapted.kept.evaluated for layer in layers]
        entries = [entry for entry in kept if entry is not None and entry.copies is not None and entry.has_inputs()]
        copies = [entry.copies for entry in entries if entry.copies is not None]
        if len({of_entry.dtype for of_entry in copies}) != 1:
            return None
        return cls(asked, entries, [tensor for entry in entries for tensor in entry.inputs], torch.cat(copies))

    def is_of(self, asked: list[object]) -> bool:
        """Whether the same was asked."""
        return len(asked) == len(self.asked) and all(map(operator.is_, asked, self.asked))

    def is_unchanged(self) -> bool:
        """Whether the vectors still have their values."""
        now, dtype = [known.tensor() for known in self.inputs], self.copies.dtype
        same = [tensor for tensor in now if tensor is not None and tensor.dtype is dtype]
        return len(same) == len(now) and have_values(same, self.copies)


def add_factor_pass(model: nn.Module) -> None:
    """Make the factors of a model's layers together from now on; once is enough."""
    if not _own_hooks(model):
        factors = FactorPass()
        model.register_forward_pre_hook(factors.begin)
        model.register_forward_hook(factors.end, always_call=True)


def remove_factor_pass(model: nn.Module) -> None:
    """Take back `add_factor_pass`."""
    for key in _own_hooks(model):
        for hooks in (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called):
            hooks.pop(key, None)


def _own_hooks(model: nn.Module) -> list[int]:
    hooks = [*model._forward_pre_hooks.items(), *model._forward_hooks.items()]
    return [key for key, hook in hooks if isinstance(getattr(hook, "__self__", None), FactorPass)]


class _Layer(NamedTuple):
    """What factors are made from."""

    adapted: AdaptedWeight
    vectors: Vectors
    weight: Tensor | None

    def is_trained(self) -> bool:
        """Whether some vector is."""
        return any(vector.requires_grad for vector in self.vectors)

    def can_be_stacked(self) -> bool:
        """Whether nothing but training changes the vectors, and the weight is frozen, whole and in memory."""
        adapted = self.adapted
        sizes = (adapted.out_features, adapted.out_features, adapted.rank)
        return (
            adapted.shard is None
            and not is_dtensor(self.weight)
            and (self.weight is None or (is_in_memory(self.weight) and not self.weight.requires_grad))
            and all(
                type(vector) is nn.Parameter and vector.shape == (size,) and vector.device == adapted.w.device
                for vector, size in zip(self.vectors, sizes, strict=True)
            )
            and not any(v.is_inference() or is_partitioned(v) or may_be_gathered(v) for v in self.vectors)
        )

    def stack_key(self) -> tuple[object, ...]:
        """What layers of one stack have in common."""
        return *self.adapted.stack_key, self.vectors.magnitude.dtype


def _alive(asked: object) -> _Layer | None:
    """What a layer asked for, if all of it still exists."""
    assert isinstance(asked, Asked)
    adapted, weight = asked.adapted(), None if asked.weight is None else asked.weight()
    vectors = [vector for of_vector in asked.vectors if (vector := of_vector()) is not None]
    if adapted is None or (weight is None) != (asked.weight is None) or len(vectors) < len(asked.vectors):
        return None
    return _Layer(adapted, Vectors(*vectors), weight)


def _make(layers: list[_Layer], begun: Pass) -> None:
    """Make the factors of all layers that can be stacked, shape by shape."""
    stacks: dict[object, list[tuple[_Layer, StackedEntry]]] = {}
    for layer in layers:
        before: StackedEntry | None = layer.adapted.kept.stacked
        if before is not None and before.is_of(*layer):
            entry = before.renewed(begun)
        elif layer.can_be_stacked():
            weight = same_or_none(layer.weight)
            entry = StackedEntry(Asked.of(*layer), layer.stack_key(), layer.vectors, weight, begun)
            entry.norm = layer.adapted.norm(layer.weight)
        else:
            continue
        stacks.setdefault(entry.shape, []).append((layer, entry))
    for of_shape in stacks.values():
        if _join_constants([layer.adapted for layer, _ in of_shape]):
            for layer, entry in of_shape:
                entry.norm = layer.adapted.norm(layer.weight)
        stack = _made_before([layer for layer, _ in of_shape])
        if stack is None:
            vectors, norms = [layer.vectors for layer, _ in of_shape], [entry.norm for _, entry in of_shape]
            stack = row_factors(vectors, norms, of_shape[0][0].adapted.settings)
        for (layer, entry), packed in zip(of_shape, stack.packed, strict=True):
            entry.packed, entry.stack = packed, stack
            layer.adapted.kept.stacked = entry


def _join_constants(weights: list[AdaptedWeight]) -> bool:
    """Make the C of all weights parts of one tensor, for one product; whether that was needed."""
    known = [weight.C for weight in weights]
    parts = joined(known)
    for weight, C, part in zip(weights, known, parts or [], strict=False):
        weight.replace_C(C, part)
    return parts is not None


def _made_before(layers: list[_Layer]) -> StackedFactors | None:
    """The factors of the last pass, if no step came between, as with accumulated gradients.

    On the CPU only, where values can be compared: not every optimizer's step is counted as a write.
    """
    entries: list[StackedEntry | None] = [layer.adapted.kept.stacked for layer in layers]
    first = entries[0]
    if first is None or first.stack.measured or len(first.stack.packed) != len(layers):
        return None
    known = first.stack.vectors
    if not known[0].is_cpu:
        return None
    for layer, entry in zip(layers, entries, strict=True):
        if entry is None or entry.stack is not first.stack:
            return None
        if not (entry.has_versions_of(layer.vectors) and entry.is_of(*layer)):
            return None
    kinds = zip(*(layer.vectors for layer in layers), strict=True)
    now = [torch.stack(of_kind).to(values.dtype) for of_kind, values in zip(kinds, known, strict=True)]
    return first.stack if all(map(torch.equal, now, known)) else None
