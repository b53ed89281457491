"""MergeableLayer: PEFT's interface for merging adapters into the weight of a layer, and unmerging them."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from ...ops.annotations import Float
from ...weight.merge import check_finite, merge, warn_of_losses
from ..restoring import surely
from .base_layer import check_mergeable, check_not_trained, readable_weight, stored_weight
from .layer_types import LayerType
from .merges import Intent, Merges
from .vectors import VECTORS, VectorDict


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
    _merges: Merges

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
        return self._merges.adapters

    def stored(self) -> Tensor | None:
        """The base's weight as it is stored now; None for a quantised layer."""
        return stored_weight(self.get_base_layer(), self.layer_type, self.parameter_name)

    def unmerged(self) -> Tensor:
        """The base's own weight, also while adapters are merged into it or it is offloaded.

        Raises:
            ValueError: adapters were merged for good.
        """
        weight = readable_weight(self.get_base_layer(), self.layer_type, self.parameter_name, self.name)
        original = self._merges.original
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
            check_mergeable(self.get_base_layer(), self.layer_type, self.parameter_name, self.name)
            names, original = [*self._merges.adapters, *new], self.unmerged()
            merged = merge(self.layer_type.layout.matrix(original), self.summed_delta(names, original))
            check_finite(merged.weight, f"{self.name}: merging {', '.join(names)}")
            stored = cast(Tensor, self.stored())
            weight = self.layer_type.layout.stored(merged.weight, stored.shape)
            self._merges.begin(names, stored, intent)
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
        check_mergeable(self.get_base_layer(), self.layer_type, self.parameter_name, self.name)
        self._merges.rest_on(intent)

    def settle(self) -> None:
        """Undo a merge that was interrupted; drop what a finished one no longer needs."""
        self._merges.settle(self._write)

    def give_up_original(self) -> None:
        """Free the copy of the base's own weight, which can then not be restored."""
        self._merges.give_up_original()

    def serves_merged(self) -> bool:
        """Whether the base's weight has the adapters merged into it.

        Raises:
            RuntimeError: they are to be trained, and would get no gradients.
        """
        if self._merges.last is None:
            return False
        names = self.merged_adapters
        if names and self.training:
            check_not_trained(names, [d[name] for d in self.vector_dicts() for name in names if name in d], self.name)
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
