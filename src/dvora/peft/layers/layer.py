"""DVoRALayer: a layer of a PEFT model with any number of named DVoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import functional as F
from ...factors import Source, delta_weight, factors_of
from ...functional import Vectors, row_norm
from ...layer import adapted_linear, thin_outputs
from ...matrices.interface import SharedProjections, checked_distribution
from ...tensors import (
    Float,
    at_least_float32,
    bias_of,
    is_dtensor,
    is_in_memory,
    is_traced,
    version_of,
    weight_in_memory,
)
from ...weight import AdaptedWeight
from .base_fingerprint import fingerprint_of
from .base_layer import Fingerprinted, measured_bias
from .layer_types import LayerType, layer_type_of
from .low_rank import linear
from .mergeable import MergeableLayer, Merges
from .mixed_rows import ActiveAdapter, RowUpdate, check_rows, mixed_outputs, row_updates, updates_in
from .opaque_weight import device_of, input_dtype, keep_differentiable
from .vectors import VECTORS, VectorDict

_ROUNDED = (torch.bfloat16, torch.float16)


class DVoRALayer(nn.Module, MergeableLayer):
    """Wraps a base layer. Its layer type says how the weight is held and used; nothing else depends on the type.

    `fingerprint` is that of the base weight, by which files recognise it; `fingerprinted` is the state it was taken of.

    Args:
        base_layer: a layer of a type in `layer_types`.
        name: of the weight in the model, for messages.
        layer_type: how it holds its weight; None looks it up by the layer's class.
        parameter_name: of the weight in the base layer.
    """

    measured_bias: Tensor | None
    out_features: int
    in_features: int
    adapter_layer_names = VECTORS
    other_param_names = ("dvora_adapted", "dvora_dropout", "dvora_strength")

    def __init__(
        self, base_layer: nn.Module, name: str, layer_type: LayerType | None = None, parameter_name: str = "weight"
    ) -> None:
        super().__init__()
        # First: many take the dtype of the first parameter for that of the model.
        self.base_layer = base_layer
        self.name = name
        self.parameter_name = parameter_name
        self.layer_type = layer_type_of(base_layer, name) if layer_type is None else layer_type
        self.dvora_magnitude = VectorDict()
        self.dvora_lambda_b = VectorDict()
        self.dvora_lambda_d = VectorDict()
        self.dvora_adapted = nn.ModuleDict()
        self.dvora_dropout = nn.ModuleDict()
        self.dvora_strength = StrengthDict()
        self.register_buffer("measured_bias", None, persistent=False)
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merges = Merges()
        self._base_loads = False
        self.fingerprint: list[float] = []
        self.fingerprinted = Fingerprinted()
        if not self.layer_type.has_weight:
            keep_differentiable(base_layer)
        self.measured_bias = measured_bias(base_layer, self.layer_type)
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
        self.dvora_strength.put(adapter_name, float(strength), adapted.w)
        self.frozen_peft_weight_names[adapter_name] = tuple(
            f"dvora_{vector}" for vector in Vectors._fields if vector not in trained
        )
        with torch.inference_mode(False):
            for field, vector_dict, value in zip(Vectors._fields, self.vector_dicts(), vectors, strict=True):
                if adapted.rank or field == "magnitude":
                    vector_dict.put(adapter_name, value)
                elif adapter_name in vector_dict:
                    del vector_dict[adapter_name]
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        # New modules start in training mode, where dropout is active.
        self.training = self.base_layer.training
        for name, child in self.named_children():
            if name != "base_layer":
                child.train(self.training)

    def vectors(self, adapter_name: str) -> Vectors:
        """The trained vectors of one adapter; zero and empty where it has the magnitude only."""
        return vectors_in(self.vector_dicts(), adapter_name)

    def adapted(self, adapter_name: str) -> AdaptedWeight:
        """The frozen side of one adapter."""
        return cast(AdaptedWeight, self.dvora_adapted[adapter_name])

    def strength(self, adapter_name: str) -> Tensor:
        """s of `W + s (W' - W)`, a tensor without dimensions."""
        return self.dvora_strength.value(adapter_name)

    def set_strength(self, adapter_name: str, number: float) -> None:
        """Change s of one adapter."""
        self.dvora_strength.set(adapter_name, number)

    def present_fingerprint(self) -> list[float]:
        """The fingerprint of the base weight as it is now; it may have been trained since it was adapted.

        A sharded weight keeps the fingerprint from when it was adapted.
        """
        stored = self.stored()
        if stored is None or not is_in_memory(stored) or is_dtensor(stored):
            return self.fingerprint
        if not self.fingerprinted.is_of(stored):
            # Recorded first, so that a write in between is noticed the next time.
            self.fingerprinted = Fingerprinted(stored)
            matrix = self.layer_type.layout.matrix(self.unmerged())
            self.fingerprint = fingerprint_of(matrix, row_norm(matrix))
        return self.fingerprint

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """The base's output, adapted by the active adapters, or row by row by those in `adapter_names`."""
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        if self._disable_adapters and self.merged:
            self.unmerge()
        base: Any = self._modules["base_layer"]
        if self._disable_adapters or (self.merges.last is not None and self.serves_merged()):
            return cast(Tensor, base(x))
        adapters = self._active(self.active_adapters)
        kind = self.layer_type
        if len(adapters) == 1 and kind.low_rank is linear and kind.has_weight and adapters[0].adapted.shard is None:
            return adapted_linear(base, x, *adapters[0], self.measured_bias)
        return self._adapted(x, base(x), adapters)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`W' - W` of one adapter, as the base's weight is stored, in float32 (float64 for a float64 base)."""
        weight = self.unmerged()
        return self.layer_type.layout.stored(self.summed_delta([adapter_name], weight), weight.shape)

    def _active(self, adapter_names: Sequence[str]) -> list[ActiveAdapter]:
        """The named adapters that this layer has, with their row factors."""
        # By `_modules`: attributes of modules take as long to look up as a small product takes.
        modules: Any = self._modules
        weight, active = self._weight_in_memory(), []
        for name in adapter_names:
            if name in modules["dvora_adapted"]._modules:
                source, dropout = self._source(name, weight), modules["dvora_dropout"]._modules[name]
                drops = dropout.training and type(dropout) is not nn.Identity
                factors = factors_of(source, weight)
                active.append(ActiveAdapter(source.adapted, factors, dropout if drops else None))
        return active

    def _source(self, adapter_name: str, weight: Tensor | None) -> Source:
        """What the row factors of an adapter are made from."""
        modules: Any = self._modules
        adapted: AdaptedWeight = modules["dvora_adapted"]._modules[adapter_name]
        vectors, strengths = vectors_in([modules[kind] for kind in VECTORS], adapter_name), modules["dvora_strength"]
        # A graph must see a change of the strength.
        whole = not is_traced() and strengths.number(adapter_name) == 1
        own = adapted.local(vectors, weight) if is_dtensor(weight) else vectors
        return Source(adapted, own, None if whole else strengths.value(adapter_name))

    def _weight_in_memory(self) -> Tensor | None:
        """The weight as stored, where it can be read in every pass."""
        base: Any = self._modules["base_layer"]
        return weight_in_memory(base, self.parameter_name) if self.layer_type.has_weight else None

    def _adapted(self, x: Tensor, base_output: Tensor, adapters: Sequence[ActiveAdapter]) -> Tensor:
        """The outputs from those of the base."""
        check_gradient(self.base_layer, self.layer_type, x, base_output, self.name)
        if not adapters:
            return base_output
        # Only now: engines gather it for the base's forward.
        bias = bias_of(self.base_layer, self.measured_bias)
        return adapted_outputs(self.base_layer, self.layer_type, x, base_output, adapters, bias)

    def _mixed(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """The outputs of a batch in which every row has an adapter of its own."""
        check_rows(adapter_names, x, self.merged_adapters, self.name)
        base_output: Tensor = self.base_layer(x)
        make = partial(self._row_updates, adapter_names, base_output.dim())
        return mixed_outputs(x, base_output, updates_in(self, adapter_names, base_output.dim(), make), self._adapted)

    def _row_updates(self, adapter_names: Sequence[str], dimensions: int) -> list[RowUpdate]:
        """The updates by row, of the adapters in the batch only: there may be thousands in the model."""
        known: Any = {} if self.disable_adapters else self.dvora_adapted._modules
        own = {name: known[name] for name in dict.fromkeys(adapter_names) if name in known}
        return row_updates(own, self._factor_rows, adapter_names, dimensions)

    def _factor_rows(self, adapter_names: Sequence[str]) -> Float[Tensor, "N F"]:
        """The factors of the named adapters, as rows of one matrix (`Factors.row`)."""
        weight = self._weight_in_memory()
        return torch.stack(
            [factors_of(self._source(name, weight), weight, together=False).row for name in adapter_names]
        )

    def summed_delta(self, adapter_names: Sequence[str], weight: Tensor) -> Float[Tensor, "O I"]:
        """`W' - W` of several adapters together, as a matrix."""
        deltas = [self.strength(n) * delta_weight(self.adapted(n), self.vectors(n), weight) for n in adapter_names]
        return sum(deltas[1:], deltas[0])

    def vector_dicts(self) -> tuple[VectorDict, VectorDict, VectorDict]:
        """Vectors by adapter name, in the order of `Vectors`."""
        return self.dvora_magnitude, self.dvora_lambda_b, self.dvora_lambda_d

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype: bfloat16 would round the magnitude by up to 0.4 %.
        if adapter_name not in self.dvora_adapted:
            return
        device = device_of(self.get_base_layer()) if device is None else device
        if device.type == "meta":
            return
        self.dvora_adapted[adapter_name].to(device)
        self.dvora_strength.move(adapter_name, device)
        for vector_dict in self.vector_dicts():
            vector_dict.move(adapter_name, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DVoRALayer:
        self.settle()
        dtype = self._base_dtype()
        super()._apply(fn, recurse)
        # A cast changes the base's values, which a graph compiled afterwards cannot notice.
        if self._base_dtype() != dtype:
            self.merges.cast(self._base_dtype())
            self._follow_base()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_loadable(state_dict, prefix)
        tensors = chain(self.base_layer.named_parameters(), self.base_layer.named_buffers())
        self._base_loads = any(f"{prefix}base_layer.{name}" in state_dict for name, _ in tensors)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def _follow_base(self) -> None:
        """Compute what depends on the base again where that has changed."""
        stored = self.stored()
        if stored is None:
            self.measured_bias = measured_bias(self.base_layer, self.layer_type)
            weight = self.unmerged()
            for name in self.dvora_adapted:
                self.adapted(name).refresh(weight)
        elif is_in_memory(stored):
            for name in self.dvora_adapted:
                self.adapted(name).refresh_after_load(self.unmerged())

    def _base_dtype(self) -> torch.dtype:
        stored = self.stored()
        return input_dtype(self.base_layer) if stored is None else stored.dtype

    def __repr__(self) -> str:
        return "dvora." + super().__repr__()


class DVoRALinear(DVoRALayer):
    """Over a linear layer; "all-linear" finds the class by its name."""


def layers_in(model: nn.Module) -> list[DVoRALayer]:
    """All adapted layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, DVoRALayer)]


def layers_of(model: nn.Module, adapter_name: str) -> list[DVoRALayer]:
    """The layers of a model that have an adapter."""
    return [layer for layer in layers_in(model) if adapter_name in layer.dvora_adapted]


def shared_projections(model: nn.Module, seed: int, distribution: str) -> SharedProjections:
    """The model's projections of this seed and distribution, or new ones."""
    for module in model.modules():
        if isinstance(module, SharedProjections) and (module.seed, module.distribution) == (seed, distribution):
            return module
    return SharedProjections(seed, checked_distribution(distribution))


def check_unmerged(model: nn.Module, adapter_name: str) -> None:
    """Refuse to change an adapter that is merged, since the merged weights would not change with it.

    Raises:
        ValueError: it is merged into some layer.
    """
    for layer in layers_of(model, adapter_name):
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged into {layer.name}; call unmerge_adapter first")


def _follow_loaded_base(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, DVoRALayer)
    if layer._base_loads:
        layer._follow_base()
        layer._base_loads = False


def adapted_outputs(
    base_layer: nn.Module,
    layer_type: LayerType,
    x: Tensor,
    base_output: Tensor,
    adapters: Sequence[ActiveAdapter],
    bias: Tensor | None,
) -> Tensor:
    """The outputs of the base with the updates of all adapters added up, in the memory format of the base's output.

    Raises:
        TypeError, ValueError: the weight is sharded in a way that is not supported.
    """
    for adapter in adapters:
        _check_part(adapter, x, base_output)
    if len(adapters) == 1 and layer_type.low_rank is linear:
        adapted, factors, dropout = adapters[0]
        return thin_outputs(base_output, x if dropout is None else dropout(x), adapted, factors, bias)
    features = -1 - layer_type.spatial
    outputs = base_output.movedim(features, -1)
    updates = [_update(base_layer, layer_type, x, outputs, adapter) for adapter in adapters]
    gains = [adapter.factors.gain_minus_one for adapter in adapters]
    summed = F.combine(outputs, sum(updates[1:], updates[0]), sum(gains[1:], gains[0]), None, bias)
    return summed.movedim(-1, features)


def _update(
    base_layer: nn.Module, layer_type: LayerType, x: Tensor, outputs: Tensor, adapter: ActiveAdapter
) -> Float[Tensor, "*T O"]:
    """`scale low` of one adapter."""
    assert layer_type.low_rank is not None
    adapted, factors, dropout = adapter
    if not adapted.rank:
        return outputs.new_zeros(1).expand_as(outputs)
    low = layer_type.low_rank(adapted, base_layer, x, factors.lambda_d, nn.Identity() if dropout is None else dropout)
    return factors.scale * laid_out_like(outputs, low)


def _check_part(adapter: ActiveAdapter, x: Tensor, base_output: Tensor) -> None:
    adapted = adapter.adapted
    if adapted.shard is None:
        return
    adapted.shard.check_sizes(x, base_output, adapted.name)
    if adapter.dropout is not None:
        raise ValueError(
            f"{adapted.name}: every process would drop different inputs of a sharded weight; set dvora_dropout=0"
        )


def laid_out_like(output: Tensor, update: Tensor) -> Tensor:
    """An update in the memory format of the base's output, so that their sum keeps it (channels_last)."""
    if update.stride() == output.stride():
        return update
    return torch.empty_like(output, dtype=update.dtype).copy_(update)


def check_gradient(layer: nn.Module, layer_type: LayerType, x: Tensor, output: Tensor, name: str) -> None:
    """Refuse to train through a layer whose forward pass has no backward pass.

    Raises:
        RuntimeError: the input requires a gradient, and the output does not.
    """
    if not layer_type.has_weight and torch.is_grad_enabled() and x.requires_grad and not output.requires_grad:
        raise RuntimeError(
            f"{name}: the base layer of type {type(layer).__name__} has no backward pass, so the layers before it "
            "would get a wrong gradient; adapt the last layers only, or quantise the base in another way"
        )


def warn_if_rounded(magnitude: Tensor) -> None:
    """Warn of a magnitude in half precision.

    Warns:
        UserWarning: it was cast below float32 through `parameter.data`, which no module can prevent.
    """
    if magnitude.dtype in _ROUNDED:
        # Without the layer's name, so that Python shows it once instead of once a layer.
        warnings.warn(
            f"a DVoRA magnitude is in {magnitude.dtype}, which rounds it by up to 0.4 % and loses small steps; "
            "keep the adapter's vectors in float32. TRL's trainers cast what is trained where the model is in 4 or 8 "
            "bits: hand them a model adapted with DVoRAConfig(..., inference_mode=True), and call "
            "model.set_adapter(...) when the trainer is made, before it trains",
            stacklevel=2,
        )


def vectors_in(dicts: Sequence[VectorDict], adapter_name: str) -> Vectors:
    """The vectors of one adapter; lambda_b is zero and lambda_d empty where it has the magnitude only.

    Args:
        dicts: in the order of `VECTORS`.
        adapter_name: in all of them, or in the first only.
    """
    magnitudes, lambdas_b, lambdas_d = dicts
    magnitude = _vector(magnitudes, adapter_name)
    warn_if_rounded(magnitude)
    if adapter_name not in lambdas_b:
        return Vectors(magnitude, torch.zeros_like(magnitude), magnitude.new_empty(0))
    return Vectors(magnitude, _vector(lambdas_b, adapter_name), _vector(lambdas_d, adapter_name))


def _vector(vectors: VectorDict, adapter_name: str) -> Tensor:
    """One of them, quickly; FSDP keeps its views of parameters elsewhere."""
    parameters = vectors._parameters
    # By subscription, which makes ZeRO-3 gather it.
    vector: Tensor | None = parameters[adapter_name] if adapter_name in parameters else vectors[adapter_name]
    assert vector is not None
    return vector


class StrengthDict(nn.Module):
    """s of `W + s (W' - W)` by adapter name: as tensors, so that a compiled model sees a change, and as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, tuple[float, int]] = {}
        """Each number, and the version of its tensor."""

    def put(self, adapter_name: str, number: float, like: Tensor) -> None:
        """Keep a strength, as a tensor with the dtype and device of another."""
        # They are in no state dict. Registered, no adapter could be named like an attribute.
        self._non_persistent_buffers_set.add(adapter_name)
        value = self._buffers[adapter_name] = like.new_full((), number)
        self._known[adapter_name] = number, version_of(value)

    def value(self, adapter_name: str) -> Tensor:
        """s of one adapter, a tensor without dimensions."""
        value = self._buffers[adapter_name]
        assert value is not None
        return value

    def number(self, adapter_name: str) -> float:
        """The same as a number, without a device synchronisation unless something else has written the tensor."""
        number, known = self._known[adapter_name]
        value = self.value(adapter_name)
        # Before the value, since another thread may write to it meanwhile.
        version = version_of(value)
        if version != known:
            number = float(value)
            self._known[adapter_name] = number, version
        return number

    @torch.no_grad()
    def set(self, adapter_name: str, number: float) -> None:
        """Change one in place."""
        value = self.value(adapter_name)
        value.fill_(number)
        self._known[adapter_name] = number, version_of(value)

    def move(self, adapter_name: str, device: torch.device) -> None:
        """Move one tensor."""
        self._change(adapter_name, lambda value: value.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StrengthDict:
        for adapter_name in self._buffers:
            self._change(adapter_name, at_least_float32(fn))
        return self

    def _change(self, adapter_name: str, fn: Callable[[Tensor], Tensor]) -> None:
        value, number = self.value(adapter_name), self.number(adapter_name)
        moved = fn(value)
        # It is in no state dict, so nothing would restore it from the meta device or fill it after `to_empty`.
        if moved is not value and not moved.is_meta:
            self._buffers[adapter_name] = moved
            self.set(adapter_name, number)

    def __contains__(self, adapter_name: object) -> bool:
        return adapter_name in self._buffers

    def __delitem__(self, adapter_name: str) -> None:
        del self._buffers[adapter_name], self._known[adapter_name]
        self._non_persistent_buffers_set.discard(adapter_name)
