"""DVoRALayer: a layer of a PEFT model with any number of named DVoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .. import functional as F
from ..adapted_weight import AdaptedWeight
from ..functional import Vectors
from ..merging import check_can_be_set, merge, warn_of_losses
from ..precision import at_least_float32
from ..shapes import Float
from .kinds import bias_of, kind_of, weight_of

BASE = "__base__"
"""PEFT's name for "no adapter" in a batch of adapter names."""


class VectorDict(nn.ParameterDict):
    """One trained vector by adapter name; never rounded below float32 when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorDict:
        super()._apply(at_least_float32(fn), recurse)
        return self


class DVoRALayer(nn.Module, BaseTunerLayer):
    """Wraps a base layer; the type of the base decides how its weight is stored, nothing else differs between types.

    Args:
        base_layer: a layer of one of the types in `kinds.KINDS`.
        name: of the layer in the model, for messages.
    """

    adapter_layer_names = ("dvora_magnitude", "dvora_lambda_b", "dvora_lambda_d")
    other_param_names = ("dvora_adapted", "dvora_dropout")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.kind = kind_of(base_layer, name)
        self.out_features, self.in_features = self.kind.matrix(weight_of(base_layer)).shape
        self.dvora_magnitude = VectorDict()
        self.dvora_lambda_b = VectorDict()
        self.dvora_lambda_d = VectorDict()
        self.dvora_adapted = nn.ModuleDict()
        self.dvora_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._original: Tensor | None = None
        self.register_load_state_dict_post_hook(_follow_loaded_base)

    def update_layer(
        self, adapter_name: str, adapted: AdaptedWeight, vectors: Vectors, dropout: float, inference_mode: bool
    ) -> None:
        """Add an adapter, or replace the one of the same name.

        Args:
            adapter_name: its name.
            adapted: its frozen side, made for `unmerged_matrix()`.
            vectors: its starting values.
            dropout: probability with which an input of the update is dropped in training.
            inference_mode: leave its vectors frozen.
        """
        self.dvora_adapted[adapter_name] = adapted
        self.dvora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        with torch.inference_mode(False):
            for vector_dict, value in zip(self._vector_dicts(), vectors, strict=True):
                vector_dict[adapter_name] = nn.Parameter(value)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def vectors(self, adapter_name: str) -> Vectors:
        """The trained vectors of one adapter."""
        return Vectors(*(vector_dict[adapter_name] for vector_dict in self._vector_dicts()))

    def adapted(self, adapter_name: str) -> AdaptedWeight:
        """The frozen side of one adapter."""
        adapted = self.dvora_adapted[adapter_name]
        assert isinstance(adapted, AdaptedWeight)
        return adapted

    def unmerged_matrix(self) -> Float[Tensor, "O I"]:
        """The base's own weight as an (out, in) matrix, also while adapters are merged into it."""
        stored = weight_of(self.base_layer)
        return self.kind.matrix(stored if self._original is None else self._original.to(stored.device))

    def forward(self, x: Float[Tensor, "*T I"], adapter_names: Sequence[str] | None = None) -> Float[Tensor, "*T O"]:
        """The base's output, adapted by the active adapters, or row by row by those in `adapter_names`."""
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        base_output: Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return base_output
        return self._adapt(x, base_output, self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base's weight; `unmerge` restores it bit for bit from a copy kept on the CPU.

        Args:
            safe_merge: PEFT's switch for refusing values that are not finite; here they always are refused.
            adapter_names: which; None means the active ones.

        Raises:
            ValueError: a merged value would not be finite; the weight is left as it was.

        Warns:
            MergePrecisionWarning: the weight's dtype swallows a considerable part of the update.
        """
        warn_of_losses(self.merge_quietly(adapter_names), weight_of(self.base_layer).dtype)

    @torch.no_grad()
    def merge_quietly(self, adapter_names: list[str] | None, keep_original: bool = True) -> dict[str, float]:
        """Merge like `merge`, and return the share of the update lost to rounding by layer name instead of warning."""
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dvora_adapted]
        if not new:
            return {}
        check_can_be_set(self.base_layer, self.name)
        stored, original = weight_of(self.base_layer), self.unmerged_matrix()
        deltas = [self._delta(name, original) for name in (*self.merged_adapters, *new)]
        merged = merge(original, torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0])
        if not merged.weight.isfinite().all():
            raise ValueError(f"{self.name}: merging {', '.join(new)} gives values that are not finite; nothing merged")
        if keep_original and self._original is None:
            self._original = stored.detach().to("cpu", copy=True)
        self.kind.matrix(stored).copy_(merged.weight)
        self.merged_adapters.extend(new)
        return {self.name: merged.lost}

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._original is not None
        weight_of(self.base_layer).copy_(self._original)
        self._original = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`W' - W` of one adapter, in the layout of the base's weight, in float32 (float64 for a float64 base)."""
        return self.kind.matrix(self._delta(adapter_name, self.unmerged_matrix()))

    def _adapt(self, x: Tensor, base_output: Tensor, adapter_names: Sequence[str]) -> Tensor:
        updates, gains = [], []
        for name in adapter_names:
            if name in self.dvora_adapted:
                inputs = self.dvora_dropout[name](x)
                update, g1 = self.adapted(name).update(inputs, self.vectors(name), self._matrix())
                updates.append(update)
                gains.append(g1)
        if not updates:
            return base_output
        return F.combine(base_output, sum(updates[1:], updates[0]), sum(gains[1:], gains[0]), bias_of(self.base_layer))

    def _mixed_forward(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"{self.name}: adapter_names has {len(adapter_names)} entries, the batch has {len(x)} rows; "
                "pass one name a row"
            )
        if self.merged:
            raise ValueError(
                f"{self.name}: adapter_names cannot be used while adapters are merged ({self.merged_adapters}); "
                "call unmerge_adapter first"
            )
        base_output: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return base_output
        output = base_output.clone()
        for name in dict.fromkeys(adapter_names):
            if name != BASE:
                rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
                output[rows] = self._adapt(x[rows], base_output[rows], [name])
        return output

    def _delta(self, adapter_name: str, original: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        return self.adapted(adapter_name).delta(self.vectors(adapter_name), original)

    def _matrix(self) -> Float[Tensor, "O I"]:
        return self.kind.matrix(weight_of(self.base_layer))

    def _vector_dicts(self) -> tuple[VectorDict, VectorDict, VectorDict]:
        return self.dvora_magnitude, self.dvora_lambda_b, self.dvora_lambda_d

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype: bfloat16 would round the magnitude by up to 0.4 %.
        device = weight_of(self.base_layer).device if device is None else device
        if adapter_name not in self.dvora_adapted:
            return
        self.dvora_adapted[adapter_name].to(device)
        for vector_dict in self._vector_dicts():
            if not vector_dict[adapter_name].is_meta:
                vector_dict[adapter_name] = nn.Parameter(
                    vector_dict[adapter_name].detach().to(device), vector_dict[adapter_name].requires_grad
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DVoRALayer:
        dtype = weight_of(self.base_layer).dtype
        super()._apply(fn, recurse)
        # A cast changes the base's values, and a graph compiled next cannot notice.
        if weight_of(self.base_layer).dtype != dtype:
            self._follow_base()
        return self

    def _follow_base(self) -> None:
        for name in self.dvora_adapted:
            self.adapted(name).follow(self.unmerged_matrix())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def __repr__(self) -> str:
        return "dvora." + super().__repr__()


def _follow_loaded_base(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, DVoRALayer)
    layer._follow_base()
