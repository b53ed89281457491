"""Merging adapters into the weight of one layer, and unmerging them; every step is recorded before it is taken.

A layer's merges are a stack of states, the newest in `Merges.last`. Each depends on an intent, one flag that all layers
of a merge share. Whatever uses a layer settles it first: states whose intent is not done are undone, from the copy of
the weight that they keep. So an interruption at any moment leaves the state before or the state after.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Sequence
from threading import get_ident
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from ...tensors import Float, is_partitioned
from ...weight import check_can_be_set, check_finite, merge, warn_of_losses
from ..restoring import surely
from .base_layer import readable_weight, stored_weight
from .layer_types import LayerType
from .vectors import VECTORS, VectorDict


class Intent:
    """One merge of one layer or of many: until `done` is set, every layer that meets it undoes it.

    One flag for all layers, so that the merge of a whole model takes effect, or is undone, at one moment.
    """

    def __init__(self) -> None:
        self.done = False
        self._thread: int | None = get_ident()

    def revoke(self) -> None:
        """Let every layer undo it."""
        self._thread = get_ident()
        self.done = False

    def check_thread(self) -> None:
        """Refuse to undo what another thread may be doing now.

        Raises:
            RuntimeError: another thread merges or unmerges.
        """
        if self._thread not in (None, get_ident()):
            raise RuntimeError(
                "another thread is merging or unmerging the adapters of this model; wait for it. If it was "
                "interrupted, call unmerge_adapter"
            )

    def __getstate__(self) -> dict[str, Any]:
        # No thread works on a copy.
        return {"done": self.done, "_thread": None}


class Merge(NamedTuple):
    """The state of one weight with adapters merged into it."""

    adapters: tuple[str, ...]
    original: Tensor | None
    """The base's own weight, on the CPU; None if it was freed."""
    intent: Intent
    replaced: Tensor | None
    """The weight before this merge, on the CPU."""
    before: Merge | None
    """The state before this merge."""


class Merges:
    """The adapters that are merged into one weight, as a stack of states; `last` is replaced in one assignment."""

    def __init__(self) -> None:
        self.last: Merge | None = None

    @property
    def adapters(self) -> list[str]:
        """Names, in the order in which they were merged."""
        return [] if self.last is None else list(self.last.adapters)

    @property
    def original(self) -> Tensor | None:
        """The base's own weight; None where nothing is merged.

        Raises:
            ValueError: no copy of it was kept.
        """
        if self.last is None:
            return None
        if self.last.original is None:
            raise ValueError(f"{', '.join(self.last.adapters)} were merged permanently: no copy of the weight was kept")
        return self.last.original

    def begin(self, adapters: Sequence[str], weight: Tensor, intent: Intent) -> None:
        """Record that adapters are merged next; undone unless the intent is fulfilled.

        Args:
            adapters: all that will be merged into the weight.
            weight: as it is now.
            intent: which must be fulfilled.
        """
        kept = weight.detach().to("cpu", copy=True)
        own = kept if self.last is None else self.last.original
        self.last = Merge(tuple(adapters), own, intent, kept, self.last)

    def rest_on(self, intent: Intent) -> None:
        """Make a finished merge depend on another intent, without which the base's own weight is restored."""
        if self.last is not None:
            original = self.original
            self.last = Merge(self.last.adapters, original, intent, original, None)

    def settle(self, write: Callable[[Tensor], None]) -> None:
        """Undo what is not done, and drop what is not needed any more.

        Args:
            write: sets the weight. It may be called again after an interruption.

        Raises:
            RuntimeError: another thread merges or unmerges.
        """
        last = merge = self.last
        weight = None
        while merge is not None and not merge.intent.done:
            merge.intent.check_thread()
            weight, merge = merge.replaced, merge.before
        if weight is not None:
            write(weight)
        if merge is not None and merge.before is not None:
            merge = merge._replace(replaced=merge.original, before=None)
        if merge is not last:
            self.last = merge

    def give_up_original(self) -> None:
        """Free the copy of the base's own weight; the merge is then permanent."""
        if self.last is not None:
            self.last = self.last._replace(original=None, replaced=None, before=None)

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the base's own weight in the dtype that the weight was cast to."""
        if self.last is not None and self.last.original is not None:
            original = self.last.original.to(dtype)
            self.last = self.last._replace(original=original, replaced=original, before=None)


class MergeableLayer(BaseTunerLayer):
    """A layer whose adapters can be merged into its weight.

    At every moment, also after an interruption, its outputs are those of its own weight with the adapters added, or
    those of the merged weight, and its own weight can be restored bit for bit.
    """

    name: str
    layer_type: LayerType
    parameter_name: str
    training: bool
    dvora_adapted: nn.ModuleDict
    merges: Merges

    def summed_delta(self, adapter_names: Sequence[str], weight: Tensor) -> Float[Tensor, "O I"]:
        """`W' - W` of several adapters together, as a matrix."""
        raise NotImplementedError

    def vector_dicts(self) -> tuple[VectorDict, VectorDict, VectorDict]:
        """Vectors by adapter name, in the order of `Vectors`."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the base's weight."""
        return bool(self.merged_adapters)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]  # PEFT keeps a list
        """Names of the merged adapters. A merge that was interrupted is undone first."""
        self.settle()
        return self.merges.adapters

    def stored(self) -> Tensor | None:
        """The base's weight as it is stored now; None for a quantised layer."""
        return stored_weight(self.get_base_layer(), self.layer_type, self.parameter_name)

    def unmerged(self) -> Tensor:
        """The base's own weight, also while adapters are merged into it or it is offloaded.

        Raises:
            ValueError: adapters were merged permanently.
        """
        weight = readable_weight(self.get_base_layer(), self.layer_type, self.parameter_name, self.name)
        original = self.merges.original
        return weight if original is None else original.to(weight.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base's weight; `unmerge` restores it bit for bit from a copy kept on the CPU.

        Args:
            safe_merge: PEFT's switch for refusing values that are not finite; here they always are refused.
            adapter_names: which; None means the active ones.

        Raises:
            TypeError: the base has no weight that could be set.
            ValueError: a merged value would not be finite; the weight is left as it was.

        Warns:
            MergePrecisionWarning: rounding to the weight's dtype removes a considerable part of the update.
        """
        intent = Intent()
        with surely(self.settle):
            losses = self.merge_quietly(adapter_names, intent)
            if losses:
                warn_of_losses(losses, self.unmerged().dtype)
            intent.done = True

    def check_mergeable(self) -> None:
        """Refuse to merge into a weight that cannot be set.

        Raises:
            TypeError: it is quantised or computed in every pass.
            ValueError: ZeRO-3 has partitioned it.
        """
        base = self.get_base_layer()
        if not self.layer_type.has_weight:
            raise TypeError(
                f"{self.name} of type {type(base).__name__} keeps its weight in a format of its own (quantised or "
                "packed) with steps larger than most updates: nothing was merged. Keep the adapter unmerged, or load "
                "the base model unquantised, load the adapter onto it and merge there"
            )
        check_can_be_set(base, self.parameter_name, self.name)
        stored = self.stored()
        if stored is not None and is_partitioned(stored) and not stored.numel():
            raise ValueError(
                f"{self.name}: DeepSpeed ZeRO-3 has partitioned the weight between the processes, so nothing can be "
                "merged; merge and unmerge on every rank within "
                "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
            )

    @torch.no_grad()
    def merge_quietly(self, adapter_names: list[str] | None, intent: Intent) -> dict[str, float]:
        """Merge as `merge` does, without its warning; undone unless the intent is fulfilled.

        Returns:
            The share of the update that rounding changed, by layer name.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dvora_adapted]
        if not new:
            return {}
        with onload_layer(self):
            self.check_mergeable()
            names, original = [*self.merges.adapters, *new], self.unmerged()
            merged = merge(self.layer_type.layout.matrix(original), self.summed_delta(names, original))
            check_finite(merged.weight, f"{self.name}: merging {', '.join(names)}")
            stored = cast(Tensor, self.stored())
            weight = self.layer_type.layout.stored(merged.weight, stored.shape)
            self.merges.begin(names, stored, intent)
            stored.copy_(weight)
        return {self.name: merged.lost}

    def unmerge(self) -> None:
        """Restore the base's own weight bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with surely(self.settle):
            self.rest_on(Intent())

    def rest_on(self, intent: Intent) -> None:
        """Make all that is merged depend on an intent: unless it is fulfilled, `settle` restores the base's own weight.

        Raises:
            TypeError, ValueError: the weight cannot be set now, or no copy was kept.
        """
        self.check_mergeable()
        self.merges.rest_on(intent)

    def settle(self) -> None:
        """Undo a merge that was interrupted; drop what a finished one no longer needs."""
        self.merges.settle(self._write)

    def serves_merged(self) -> bool:
        """Whether the base's weight has the adapters merged into it.

        Raises:
            RuntimeError: they are to be trained, and would get no gradients.
        """
        if self.merges.last is None:
            return False
        names = self.merged_adapters
        vectors = [vectors[name] for vectors in self.vector_dicts() for name in names if name in vectors]
        if self.training and torch.is_grad_enabled() and any(vector.requires_grad for vector in vectors):
            raise RuntimeError(
                f"{self.name}: adapters are merged ({', '.join(names)}), so training would give them no gradients; "
                "call unmerge_adapter first, or model.eval() if this is no training"
            )
        return bool(names)

    def check_loadable(self, keys: Container[str], prefix: str) -> None:
        """Refuse values for a weight with merged adapters, and for the vectors of these.

        Args:
            keys: of a state dict.
            prefix: of this layer's keys there.

        Raises:
            ValueError: there are such values.
        """
        names = self.merged_adapters
        own = [f"base_layer.{self.path_from_base()}", *(f"{vector}.{name}" for vector in VECTORS for name in names)]
        found = [prefix + key for key in own if prefix + key in keys]
        if names and found:
            raise ValueError(
                f"{found[0]} cannot be loaded while adapters are merged into the weight ({', '.join(names)}): call "
                "unmerge_adapter first. It could not be known whether a loaded weight has them merged already, "
                "and loaded vectors would not be used"
            )

    def path_from_base(self) -> str:
        """The weight's name as seen from the base layer."""
        return self.parameter_name

    @torch.no_grad()
    def _write(self, weight: Tensor) -> None:
        with onload_layer(self):
            cast(Tensor, self.stored()).copy_(weight)
