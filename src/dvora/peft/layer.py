"""DVoRALayer: a layer of a PEFT model with any number of named DVoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from ..adapter_file.fingerprint import fingerprint_of
from ..factors import Factors, delta_weight, factors_of
from ..functional import Vectors, row_norm
from ..layer import adapted_linear
from ..matrices.interface import SharedProjections, checked_distribution
from ..tensors import (
    Float,
    TensorVersion,
    at_least_float32,
    bias_of,
    is_dtensor,
    is_in_memory,
    is_partitioned,
    is_traced,
    weight_in_memory,
)
from ..weight import AdaptedWeight, check_can_be_set, check_finite, merge, warn_of_losses
from .base_weight import device_of, input_dtype, keep_differentiable, measured_bias, readable_weight, stored_weight
from .layer_types import ActiveAdapter, LayerType, adapted_outputs, check_gradient, layer_type_of, linear
from .mixed_batch import check_rows, row_updates, updates_in
from .restoring import restored_on_error

VECTORS = ("dvora_magnitude", "dvora_lambda_b", "dvora_lambda_d")
"""Attributes of a layer, in the order of `functional.Vectors`."""


class MergeState(NamedTuple):
    """What a merge changes in a layer; weights are copies on the CPU."""

    adapters: list[str]
    original: Tensor | None
    weight: Tensor
    """As it is stored, merged or not."""


class DVoRALayer(nn.Module, BaseTunerLayer):
    """Wraps a base layer. Its layer type says how the weight is held and used; nothing else depends on the type.

    `fingerprint` is that of the base weight, by which files recognise it. `merged_adapters` are merged into the base's
    weight, in this order; `original` is the base's own weight meanwhile, on the CPU.

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
        self.dvora_strength: dict[str, float] = {}
        self.register_buffer("measured_bias", None, persistent=False)
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self.original: Tensor | None = None
        self._base_loads = False
        self.fingerprint: list[float] = []
        self.fingerprint_version: TensorVersion | None = None
        if not self.layer_type.has_weight:
            keep_differentiable(base_layer)
        self.measured_bias = measured_bias(base_layer, self.layer_type)
        self.register_load_state_dict_post_hook(_follow_loaded_base)

    # ---- the forward

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """The base's output, adapted by the active adapters, or row by row by those in `adapter_names`."""
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        base: Any = self._modules["base_layer"]
        if self._disable_adapters or (self.merged_adapters and self.serves_merged()):
            return cast(Tensor, base(x))
        # By `_modules`: attributes of modules take as long to look up as a small product takes.
        here, kind = cast(Any, self._modules["dvora_adapted"])._modules, self.layer_type
        names = [name for name in self.active_adapters if name in here]
        weight = self._weight_in_memory()
        if len(names) == 1 and kind.low_rank is linear and kind.has_weight and not is_dtensor(weight):
            adapter = self._whole(names[0], weight)
            return adapted_linear(base, x, weight, *adapter, self._dropout(names[0]), self.measured_bias)
        adapters = [ActiveAdapter(here[name], self._factors(name, weight), self._dropout(name)) for name in names]
        return self._adapted(x, base(x), adapters)

    def _whole(self, adapter_name: str, weight: Tensor | None) -> tuple[AdaptedWeight, Vectors, float]:
        """An adapter: its frozen side, its vectors (of a sharded weight those of this process), and its strength."""
        modules: Any = self._modules
        adapted: AdaptedWeight = modules["dvora_adapted"]._modules[adapter_name]
        vectors = vectors_in([modules[kind] for kind in VECTORS], adapter_name)
        local = adapted.local(vectors, weight) if is_dtensor(weight) else vectors
        return adapted, local, self.dvora_strength[adapter_name]

    def _factors(self, adapter_name: str, weight: Tensor | None) -> Factors:
        adapted, vectors, strength = self._whole(adapter_name, weight)
        return factors_of(adapted, vectors, weight, strength)

    def _dropout(self, adapter_name: str) -> nn.Module | None:
        """The dropout of an adapter's inputs; None where nothing is dropped."""
        dropout = cast(Any, self._modules["dvora_dropout"])._modules[adapter_name]
        return dropout if dropout.training and type(dropout) is not nn.Identity else None

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
        updates = updates_in(self, adapter_names, base_output.dim(), self._row_updates)
        return self._adapted(x, base_output, updates)

    def _row_updates(self, adapter_names: Sequence[str], dimensions: int) -> list[ActiveAdapter]:
        """The updates by row, of the adapters in the batch only: there may be thousands in the model."""
        here: Any = {} if self.disable_adapters else self.dvora_adapted._modules
        adapted = {name: here[name] for name in dict.fromkeys(adapter_names) if name in here}
        weight = self._weight_in_memory() if adapted else None
        values = {name: self._factors(name, weight).row for name in adapted}
        return row_updates(adapted, values, adapter_names, dimensions)

    # ---- its adapters

    def update_layer(
        self,
        adapter_name: str,
        adapted: AdaptedWeight,
        vectors: Vectors,
        *,
        trained: Sequence[str] = Vectors._fields,
        strength: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        """Add an adapter, or replace the one of the same name; which are active and trained is for `set_adapter`.

        Args:
            adapter_name, adapted, vectors: its name, its frozen side for `unmerged()`, and its starting values.
            trained: which of the vectors are trained.
            strength: s of `W + s (W' - W)`.
            dropout: probability with which an input of the update is dropped in training.
        """
        self.out_features, self.in_features = adapted.out_features, adapted.in_features
        self.dvora_adapted[adapter_name] = adapted
        self.dvora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.dvora_strength[adapter_name] = float(strength)
        frozen = tuple(f"dvora_{vector}" for vector in Vectors._fields if vector not in trained)
        self.frozen_peft_weight_names[adapter_name] = frozen
        with torch.inference_mode(False):
            for field, vector_dict, value in zip(Vectors._fields, self.vector_dicts(), vectors, strict=True):
                if adapted.rank or field == "magnitude":
                    vector_dict[adapter_name] = nn.Parameter(value)
                elif adapter_name in vector_dict:
                    del vector_dict[adapter_name]
        # New modules start in training mode, where dropout is active.
        self.training = self.base_layer.training
        for name, child in self.named_children():
            if name != "base_layer":
                child.train(self.training)

    def vectors(self, adapter_name: str) -> Vectors:
        """The trained vectors of one adapter; zero and empty where it has the magnitude only."""
        return vectors_in(self.vector_dicts(), adapter_name)

    def vector_dicts(self) -> tuple[VectorDict, VectorDict, VectorDict]:
        """Vectors by adapter name, in the order of `Vectors`."""
        return self.dvora_magnitude, self.dvora_lambda_b, self.dvora_lambda_d

    def adapted(self, adapter_name: str) -> AdaptedWeight:
        """The frozen side of one adapter."""
        return cast(AdaptedWeight, self.dvora_adapted[adapter_name])

    def strength(self, adapter_name: str) -> float:
        """s of `W + s (W' - W)`."""
        return self.dvora_strength[adapter_name]

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """Change s of one adapter."""
        self.dvora_strength[adapter_name] = strength

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`s (W' - W)` of one adapter, as the base's weight is stored, in float32 (float64 for a float64 base)."""
        weight = self.unmerged()
        return self.layer_type.layout.stored(self.summed_delta([adapter_name], weight), weight.shape)

    def summed_delta(self, adapter_names: Sequence[str], weight: Tensor) -> Float[Tensor, "O I"]:
        """`s (W' - W)` of several adapters together, as a matrix."""
        deltas = [self.strength(n) * delta_weight(self.adapted(n), self.vectors(n), weight) for n in adapter_names]
        return sum(deltas[1:], deltas[0])

    # ---- the base's weight, and merging into it

    def stored(self) -> Tensor | None:
        """The base's weight as it is stored now; None for a quantised layer."""
        return stored_weight(self.get_base_layer(), self.layer_type, self.parameter_name)

    def unmerged(self) -> Tensor:
        """The base's own weight, also while adapters are merged into it (unless permanently) or it is offloaded."""
        weight = readable_weight(self.get_base_layer(), self.layer_type, self.parameter_name, self.name)
        return self.checked_original().to(weight.device) if self.merged_adapters else weight

    def present_fingerprint(self) -> list[float]:
        """That of the base weight as it is now: it may have been trained. A sharded weight keeps the one it had."""
        stored = self.stored()
        if stored is None or not is_in_memory(stored) or is_dtensor(stored):
            return self.fingerprint
        if self.fingerprint_version is None or not self.fingerprint_version.is_of(stored):
            # The version before the values, so that a write in between is noticed the next time.
            self.fingerprint_version = TensorVersion.of(stored)
            matrix = self.layer_type.layout.matrix(self.unmerged())
            self.fingerprint = fingerprint_of(matrix, row_norm(matrix))
        return self.fingerprint

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base's weight, as `DVoRAModel.merge_adapter` does for all layers."""
        with restored_on_error(self) as undo:
            if lost := self.merge_quietly(adapter_names, undo):
                warn_of_losses(lost, self.unmerged().dtype)

    def check_mergeable(self) -> None:
        """Refuse to merge into a weight that cannot be set: quantised, computed in every pass or sharded."""
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

    def unmerge(self) -> None:
        """Restore the base's own weight bit for bit, from a copy that is on the CPU until then."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_mergeable()
        self.restore(MergeState([], None, self.checked_original()))

    def checked_original(self) -> Tensor:
        """The base's own weight while adapters are merged into it, on the CPU, if a copy was kept."""
        if self.original is None:
            names = ", ".join(self.merged_adapters)
            raise ValueError(f"{names} were merged permanently: no copy of the weight was kept")
        return self.original

    @torch.no_grad()
    def restore(self, state: MergeState) -> None:
        """Put the weight and what is merged into it back."""
        with onload_layer(self):
            cast(Tensor, self.stored()).copy_(state.weight)
        self.merged_adapters, self.original = state.adapters, state.original

    @torch.no_grad()
    def merge_quietly(self, adapter_names: list[str] | None, undo: ExitStack) -> dict[str, float]:
        """Merge further adapters (None: the active ones); the share of the update that rounding changed, by name.

        `undo` gets the way back before anything changes: it holds a copy of the weight on the CPU.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.dvora_adapted]
        if not new:
            return {}
        self.check_mergeable()
        with onload_layer(self):
            names, original = [*self.merged_adapters, *new], self.unmerged()
            merged = merge(self.layer_type.layout.matrix(original), self.summed_delta(names, original))
            check_finite(merged.weight, f"{self.name}: merging {', '.join(names)}")
            stored = cast(Tensor, self.stored())
            weight = self.layer_type.layout.stored(merged.weight, stored.shape)
            state = MergeState(self.merged_adapters, self.original, stored.detach().to("cpu", copy=True))
            undo.callback(self.restore, state)
            self.original = self.original if self.merged_adapters else state.weight
            self.merged_adapters = names
            stored.copy_(weight)
        return {self.name: merged.lost}

    def serves_merged(self) -> bool:
        """Whether the base's weight has adapters merged into it; refused if these are to be trained."""
        names = self.merged_adapters
        vectors = (vectors[name] for vectors in self.vector_dicts() for name in names if name in vectors)
        if self.training and torch.is_grad_enabled() and any(vector.requires_grad for vector in vectors):
            raise RuntimeError(
                f"{self.name}: adapters are merged ({', '.join(names)}), so training would give them no gradients; "
                "call unmerge_adapter first, or model.eval() if this is no training"
            )
        return bool(names)

    def check_loadable(self, keys: Container[str], prefix: str) -> None:
        """Refuse keys of a state dict, after `prefix`, of a weight with merged adapters, or of the vectors of these."""
        if not (names := self.merged_adapters):
            return
        refused = [f"base_layer.{self.path_from_base()}", *(f"{vector}.{name}" for vector in VECTORS for name in names)]
        if present := [prefix + key for key in refused if prefix + key in keys]:
            raise ValueError(
                f"{present[0]} cannot be loaded while adapters are merged into the weight ({', '.join(names)}): call "
                "unmerge_adapter first. It could not be known whether a loaded weight has them merged already, "
                "and loaded vectors would not be used"
            )

    def path_from_base(self) -> str:
        """The weight's name as seen from the base layer."""
        return self.parameter_name

    # ---- what PyTorch and PEFT ask of a module

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype: bfloat16 would round the magnitude by up to 0.4 %.
        if adapter_name not in self.dvora_adapted:
            return
        device = device_of(self.get_base_layer()) if device is None else device
        if device.type == "meta":
            return
        self.dvora_adapted[adapter_name].to(device)
        for vectors in self.vector_dicts():
            vector = vectors.get(adapter_name)
            if vector is not None and not vector.is_meta:
                vectors[adapter_name] = nn.Parameter(vector.detach().to(device), vector.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DVoRALayer:
        dtype = self._base_dtype()
        super()._apply(fn, recurse)
        # A cast changes the base's values, which a graph compiled afterwards cannot notice.
        if self._base_dtype() != dtype:
            self.original = None if self.original is None else self.original.to(self._base_dtype())
            self._follow_base()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_loadable(state_dict, prefix)
        tensors = chain(self.base_layer.named_parameters(), self.base_layer.named_buffers())
        self._base_loads = not state_dict.keys().isdisjoint([f"{prefix}base_layer.{name}" for name, _ in tensors])
        super()._load_from_state_dict(state_dict, prefix, *args)

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

    def __getstate__(self) -> dict[str, Any]:
        # Of the tensor here, which a copy does not share.
        return {**self.__dict__, "fingerprint_version": None}

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
    """Refuse to change an adapter that is merged, since the merged weights would not change with it."""
    for layer in layers_of(model, adapter_name):
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged into {layer.name}; call unmerge_adapter first")


def vectors_in(dicts: Sequence[VectorDict], adapter_name: str) -> Vectors:
    """The vectors of one adapter; lambda_b is zero and lambda_d empty where it has the magnitude only."""
    magnitudes, lambdas_b, lambdas_d = dicts
    magnitude = _vector(magnitudes, adapter_name)
    if magnitude.dtype.itemsize < 4:
        _warn_of_rounding(magnitude.dtype)
    if adapter_name not in lambdas_b:
        absent = _absent.__wrapped__ if is_traced() else _absent
        return Vectors(magnitude, *absent(len(magnitude), magnitude.dtype, magnitude.device))
    return Vectors(magnitude, _vector(lambdas_b, adapter_name), _vector(lambdas_d, adapter_name))


@cache
def _absent(out_features: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lambda_b and lambda_d of a magnitude alone: the same tensors in every pass, by which its factors are kept."""
    with torch.inference_mode(False):
        return torch.zeros(out_features, dtype=dtype, device=device), torch.empty(0, dtype=dtype, device=device)


class VectorDict(nn.ParameterDict):
    """One vector by adapter name; stays in float32 or above when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorDict:
        super()._apply(at_least_float32(fn), recurse)
        return self


def _vector(vectors: VectorDict, adapter_name: str) -> Tensor:
    """One of them, quickly; FSDP keeps its views of parameters elsewhere."""
    parameters = vectors._parameters
    # By subscription, which makes ZeRO-3 gather it.
    vector: Tensor | None = parameters[adapter_name] if adapter_name in parameters else vectors[adapter_name]
    assert vector is not None
    return vector


def _warn_of_rounding(dtype: torch.dtype) -> None:
    # It was cast through `parameter.data`, which no module can prevent. Without the layer's name, so that Python shows
    # it once instead of once a layer.
    warnings.warn(
        f"a DVoRA magnitude is in {dtype}, which rounds it by up to 0.4 % and loses small steps; "
        "keep the adapter's vectors in float32. TRL's trainers cast what is trained where the model is in 4 or 8 "
        "bits: hand them a model adapted with DVoRAConfig(..., inference_mode=True), and call "
        "model.set_adapter(...) when the trainer is made, before it trains",
        stacklevel=2,
    )


def _follow_loaded_base(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, DVoRALayer)
    if layer._base_loads:
        layer._follow_base()
        layer._base_loads = False
