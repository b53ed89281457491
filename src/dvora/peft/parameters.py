"""Adapters on a parameter that its module reads itself, such as attention's projections and experts.

No layer is called whose output could be changed, so the module gets the adapted weight in every pass. So does all code
that reads the parameter from outside, such as torch's fused transformer layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..tensors import is_partitioned
from .layer import DVoRALayer, DVoRALinear
from .layer_types import LayerType
from .mixed_batch import is_silent

# Attributes of attention that torch's fused layers ask for by a private name.
_PRIVATE = ("_qkv_same_embed_dim",)


class ParamWrapper(DVoRALayer):
    """Wraps a module, or a wrapper of it, and adapts one of its parameters. PEFT knows the class by its name."""

    def __init__(self, base_layer: nn.Module, parameter_name: str, name: str, layer_type: LayerType) -> None:
        super().__init__(base_layer, name, layer_type, parameter_name)
        self._lock = RLock()

    def adapted_weight(self) -> Tensor:
        """The parameter with the active adapters, in its own dtype; the parameter itself where there are none."""
        if torch.compiler.is_compiling():
            return self._adapted_weight()
        with self._lock:
            return self._adapted_weight()

    def _adapted_weight(self) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        weight = self.stored()
        assert weight is not None
        if weight.is_meta:
            raise ValueError(
                f"{self.name} is offloaded, and its module would put the unadapted weight back as it loads it; keep "
                "the module in memory, or merge its adapters first"
            )
        names = [] if is_silent(self) else [name for name in self.active_adapters if name in self.dvora_adapted]
        if self.disable_adapters or self.serves_merged() or not names:
            return weight
        if is_partitioned(weight):
            raise ValueError(
                f"{self.name} is read by its module, and DeepSpeed ZeRO-3 hands it the unadapted weight; use "
                "ZeRO-2 or FSDP, merge the adapters first, or adapt layers that are called"
            )
        matrix = self.layer_type.layout.matrix(weight)
        delta = self.summed_delta(names, weight)
        return self.layer_type.layout.stored((matrix.to(delta.dtype) + delta).to(weight.dtype), weight.shape)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the module returns with its parameter adapted.

        Raises:
            ValueError: `adapter_names` is given; a parameter serves the whole batch.
        """
        if adapter_names is not None:
            self.check_serves_all_rows(adapter_names)
        if torch.compiler.is_compiling():
            replaced = {self.path_from_base(): self.adapted_weight()}
            return functional_call(self.base_layer, replaced, args, kwargs, tie_weights=False)
        # All threads share the module. No parametrization, which would change the module's class and its state dict.
        with self._lock:
            weight = self._adapted_weight()
            if weight is self.stored():
                return self.base_layer(*args, **kwargs)
            module = self.get_base_layer()
            # FSDP keeps its view of a parameter as a plain attribute, which would hide a parameter set in its place.
            holder: dict[str, Any] = vars(module) if self.parameter_name in vars(module) else module._parameters
            stored = holder[self.parameter_name]
            holder[self.parameter_name] = weight
            try:
                return self.base_layer(*args, **kwargs)
            finally:
                holder[self.parameter_name] = stored

    def check_serves_all_rows(self, adapter_names: Sequence[str]) -> None:
        """Refuse adapter names with which some row would need another weight than the others."""
        if self.merged or not set(adapter_names).isdisjoint(self.dvora_adapted):
            raise ValueError(
                f"{self.name}: adapter_names needs a layer that is called row by row, and this is a parameter that "
                "its module reads; run one adapter at a time (set_adapter), or adapt other layers"
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrappers, that of attention's output projection included; PEFT calls this."""
        assert not merge, "the tuner merges all layers before it unloads any"
        module: nn.Module = self.get_base_layer()
        for name, child in module.named_children():
            if isinstance(child, ParamWrapper):
                setattr(module, name, child.get_base_layer())
        return module

    @property
    def weight(self) -> Tensor:
        """The adapted weight, where that is the parameter; the module's weight otherwise."""
        if self.parameter_name == "weight":
            return self.adapted_weight()
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"

    def path_from_base(self) -> str:
        """The parameter's name as seen from the base layer, which may be a wrapper itself."""
        depth, module = 0, self.base_layer
        while isinstance(module, ParamWrapper):
            depth, module = depth + 1, module.base_layer
        return "base_layer." * depth + self.parameter_name

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a lock of its own.
        return {key: value for key, value in super().__getstate__().items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = RLock()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base_layer" not in modules or (name.startswith("_") and name not in _PRIVATE):
                raise
        wrapper = wrapped(self, name)
        return getattr(self.get_base_layer(), name) if wrapper is None else wrapper.adapted_weight()


class ReadLinear(ParamWrapper):
    """Over a linear layer that its module reads; "all-linear" finds the class by its name."""


class UnfusedLinear(DVoRALinear):
    """Over a linear layer of torch's transformer layer, whose fused evaluation would read the base's weight only."""

    @property
    def weight(self) -> Tensor:
        """The base's weight; while adapters are active a meta tensor, for which torch does not take its fused path."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        active = any(name in self.dvora_adapted for name in self.active_adapters)
        if self.disable_adapters or self.merged or not active:
            return weight
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def wrapped(module: nn.Module, parameter_name: str) -> ParamWrapper | None:
    """The wrapper of a parameter, if the module has one."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter_name:
            return module
        module = module.base_layer
    return None


def projections_of(attention: nn.MultiheadAttention) -> list[str]:
    """The names of the parameters that attention projects its inputs with."""
    names = ["in_proj_weight"] if attention._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return [name for name in names if isinstance(getattr(attention, name), Tensor)]
