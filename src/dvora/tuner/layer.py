"""DVoRALayer: a layer of a PEFT model with any number of named DVoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..adapted_weight import AdaptedWeight
from ..functional import Vectors
from ..layouts import is_at_hand, weight_at_hand
from ..merging import merge, warn_of_losses
from ..shapes import Float
from .base import Probed, bias_of, check_gradient, check_mergeable, measured_bias, readable_weight, stored_weight
from .kinds import LayerKind, kind_of
from .operating_weight import device_of, input_dtype, keep_differentiable
from .outputs import ActiveAdapter, adapted_outputs, updated_outputs
from .rows import check_rows, mixed_outputs
from .vectors import VECTORS, Strength, VectorDict, told_if_rounded


class DVoRALayer(nn.Module, BaseTunerLayer):
    """Wraps a base layer; its kind decides how the weight is held and used, nothing else differs between types.

    `probes` are those of the base weight, by which files recognise it, and `probed` the state that they are of.

    Args:
        base_layer: a layer that `kinds.kind_of` knows.
        name: of the weight in the model, for messages.
        kind: of the weight; None looks it up by the layer's type.
        parameter_name: of the weight in the base layer.
    """

    measured_bias: Tensor | None
    out_features: int
    in_features: int
    adapter_layer_names = VECTORS
    other_param_names = ("dvora_adapted", "dvora_dropout", "dvora_strength")

    def __init__(
        self, base_layer: nn.Module, name: str, kind: LayerKind | None = None, parameter_name: str = "weight"
    ) -> None:
        super().__init__()
        # First, because the first parameter's dtype is what many take for that of the model.
        self.base_layer = base_layer
        self.name = name
        self.parameter_name = parameter_name
        self.kind = kind_of(base_layer, name) if kind is None else kind
        self.dvora_magnitude = VectorDict()
        self.dvora_lambda_b = VectorDict()
        self.dvora_lambda_d = VectorDict()
        self.dvora_adapted = nn.ModuleDict()
        self.dvora_dropout = nn.ModuleDict()
        self.dvora_strength = nn.ModuleDict()
        self.register_buffer("measured_bias", None, persistent=False)
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._original: Tensor | None = None
        self._base_loads = False
        self.probes: list[float] = []
        self.probed = Probed()
        if not self.kind.has_weight:
            keep_differentiable(base_layer)
        self.measured_bias = measured_bias(base_layer, self.kind)
        self.register_load_state_dict_post_hook(_follow_loaded_base)

    def update_layer(
        self,
        adapter_name: str,
        adapted: AdaptedWeight,
        vectors: Vectors,
        *,
        trained: Sequence[str] = Vectors._fields,
        strength: float = 1.0,
        dropout: float = 0.0,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace the one of the same name.

        Args:
            adapter_name, adapted, vectors: its name, its frozen side for `unmerged()`, and its starting values.
            trained: which of the vectors are trained; none in `inference_mode`.
            strength: s of `W + s (W' - W)`.
            dropout: probability with which an input of the update is dropped in training.
        """
        self.out_features, self.in_features = adapted.out_features, adapted.in_features
        self.dvora_adapted[adapter_name] = adapted
        self.dvora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.dvora_strength[adapter_name] = Strength(adapted.w, float(strength))
        self.frozen_peft_weight_names[adapter_name] = tuple(
            f"dvora_{vector}" for vector in Vectors._fields if vector not in trained
        )
        with torch.inference_mode(False):
            for vector_dict, value in zip(self._vector_dicts(adapter_name), vectors, strict=False):
                vector_dict[adapter_name] = nn.Parameter(value)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def vectors(self, adapter_name: str) -> Vectors:
        """The trained vectors of one adapter; zero and empty where it has the magnitude only."""
        return self._vectors(adapter_name, self.adapted(adapter_name).rank)

    def adapted(self, adapter_name: str) -> AdaptedWeight:
        """The frozen side of one adapter."""
        return cast(AdaptedWeight, self.dvora_adapted[adapter_name])

    def strength(self, adapter_name: str) -> Tensor:
        """s of `W + s (W' - W)`, a tensor without dimensions."""
        return cast(Strength, self.dvora_strength[adapter_name]).value

    def stored(self) -> Tensor | None:
        """The base's weight as it is stored now, or None where only the base's forward knows it."""
        return stored_weight(self.get_base_layer(), self.kind, self.parameter_name)

    def unmerged(self) -> Tensor:
        """The base's own weight, also while adapters are merged into it or it is offloaded."""
        weight = readable_weight(self.get_base_layer(), self.kind, self.parameter_name, self.name)
        return weight if self._original is None else self._original.to(weight.device)

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """The base's output, adapted by the active adapters, or row by row by those in `adapter_names`."""
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            base_output: Tensor = self.base_layer(x)
            return base_output
        adapters = self._at_work(self.active_adapters)
        outputs = updated_outputs(self.base_layer, x, adapters)
        return self._adapted(x, self.base_layer(x), adapters) if outputs is None else outputs

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base's weight; `unmerge` restores it bit for bit from a copy kept on the CPU.

        Args:
            safe_merge: PEFT's switch for refusing values that are not finite; here they always are refused.
            adapter_names: which; None means the active ones.

        Raises:
            TypeError: the base has no weight that could be set.
            ValueError: a merged value would not be finite; the weight is left as it was.

        Warns:
            MergePrecisionWarning: the weight's dtype swallows a considerable part of the update.
        """
        losses = self.merge_quietly(adapter_names)
        if losses:
            warn_of_losses(losses, self.unmerged().dtype)

    @torch.no_grad()
    def merge_quietly(self, adapter_names: list[str] | None, keep_original: bool = True) -> dict[str, float]:
        """Merge like `merge`, and return the share of the update lost to rounding by layer name instead of warning."""
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dvora_adapted]
        if not new:
            return {}
        check_mergeable(self.get_base_layer(), self.kind, self.parameter_name, self.name)
        stored, original = self.stored(), self.unmerged()
        assert stored is not None
        merged = merge(self._matrix_of(original), self._delta([*self.merged_adapters, *new], original))
        if not merged.weight.isfinite().all():
            raise ValueError(f"{self.name}: merging {', '.join(new)} gives values that are not finite; nothing merged")
        if keep_original and self._original is None:
            self._original = stored.detach().to("cpu", copy=True)
        stored.copy_(self.kind.layout.stored(merged.weight, stored.shape))
        self.merged_adapters.extend(new)
        return {self.name: merged.lost}

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        check_mergeable(self.get_base_layer(), self.kind, self.parameter_name, self.name)
        cast(Tensor, self.stored()).copy_(cast(Tensor, self._original))
        self._original = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`W' - W` of one adapter, as the base's weight is stored, in float32 (float64 for a float64 base)."""
        weight = self.unmerged()
        return self.kind.layout.stored(self._delta([adapter_name], weight), weight.shape)

    def _at_work(self, adapter_names: Sequence[str]) -> list[ActiveAdapter]:
        """Those of the named adapters that this layer has."""
        weight = weight_at_hand(self.get_base_layer(), self.parameter_name) if self.kind.has_weight else None
        at_work, all_adapted = [], self.dvora_adapted
        for name in adapter_names:
            if name in all_adapted:
                adapted, strength = cast(AdaptedWeight, all_adapted[name]), self.strength(name)
                vectors = adapted.local(self._vectors(name, adapted.rank), weight)
                factors = adapted.row_factors(vectors, weight, strength)
                at_work.append(ActiveAdapter(adapted, vectors, factors, self.dvora_dropout[name], strength))
        return at_work

    def _adapted(self, x: Tensor, base_output: Tensor, adapters: Sequence[ActiveAdapter]) -> Tensor:
        check_gradient(self.base_layer, self.kind, x, base_output, self.name)
        if not adapters:
            return base_output
        bias = bias_of(self.base_layer, self.measured_bias)
        return adapted_outputs(self.base_layer, self.kind, x, base_output, adapters, bias)

    def _mixed_forward(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        check_rows(adapter_names, x, self.merged_adapters, self.name)
        base_output: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return base_output
        return mixed_outputs(x, base_output, adapter_names, self._adapt_rows)

    def _adapt_rows(self, x: Tensor, base_output: Tensor, adapter_names: Sequence[str]) -> Tensor:
        return self._adapted(x, base_output, self._at_work(adapter_names))

    def _matrix_of(self, weight: Tensor) -> Float[Tensor, "O I"]:
        return self.kind.layout.matrix(weight)

    def _delta(self, adapter_names: Sequence[str], weight: Tensor) -> Float[Tensor, "O I"]:
        deltas = [self.strength(n) * self.adapted(n).delta(self.vectors(n), weight) for n in adapter_names]
        return sum(deltas[1:], deltas[0])

    def _vectors(self, adapter_name: str, rank: int) -> Vectors:
        magnitude = told_if_rounded(self.dvora_magnitude[adapter_name])
        if not rank:
            return Vectors(magnitude, torch.zeros_like(magnitude), magnitude.new_empty(0))
        return Vectors(magnitude, self.dvora_lambda_b[adapter_name], self.dvora_lambda_d[adapter_name])

    def _vector_dicts(self, adapter_name: str) -> tuple[VectorDict, ...]:
        """Where the vectors of an adapter are kept: without a rank there is a magnitude only."""
        dicts = self.dvora_magnitude, self.dvora_lambda_b, self.dvora_lambda_d
        return dicts if self.adapted(adapter_name).rank else dicts[:1]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype: bfloat16 would round the magnitude by up to 0.4 %.
        if adapter_name not in self.dvora_adapted:
            return
        device = device_of(self.get_base_layer()) if device is None else device
        if device.type == "meta":
            return
        self.dvora_adapted[adapter_name].to(device)
        self.dvora_strength[adapter_name].to(device)
        for vector_dict in self._vector_dicts(adapter_name):
            vector_dict.move(adapter_name, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DVoRALayer:
        dtype = self._base_dtype()
        super()._apply(fn, recurse)
        # A cast changes the base's values, and a graph compiled next cannot notice.
        if self._base_dtype() != dtype:
            self._original = None if self._original is None else self._original.to(self._base_dtype())
            self._follow_base()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        tensors = chain(self.base_layer.named_parameters(), self.base_layer.named_buffers())
        self._base_loads = any(f"{prefix}base_layer.{name}" in state_dict for name, _ in tensors)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _follow_base(self) -> None:
        """Measure the base anew where it has changed."""
        stored = self.stored()
        if stored is None:
            self.measured_bias = measured_bias(self.base_layer, self.kind)
            weight = self.unmerged()
            for name in self.dvora_adapted:
                self.adapted(name).refresh(weight)
        elif is_at_hand(stored):
            for name in self.dvora_adapted:
                self.adapted(name).follow_loaded(self.unmerged())

    def _base_dtype(self) -> torch.dtype:
        stored = self.stored()
        return input_dtype(self.base_layer) if stored is None else stored.dtype

    def __repr__(self) -> str:
        return "dvora." + super().__repr__()


class DVoRALinear(DVoRALayer):
    """Over a linear layer; PEFT finds those of "all-linear" by the name of their class."""


def layers_in(model: nn.Module) -> list[DVoRALayer]:
    """All adapted layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, DVoRALayer)]


def _follow_loaded_base(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, DVoRALayer)
    if layer._base_loads:
        layer._follow_base()
        layer._base_loads = False
