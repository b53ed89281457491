"""An adapter in a model: where its values are, and other values in their place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..adapter_file.content import CommonSettings, Content, LayerSizes, SavedWhole
from ..adapter_file.fingerprint import change, warn_of_changes
from ..adapter_file.settings import DVoRAConfig
from ..adapter_file.values import of_dvora
from ..adapter_file.values_file import VECTOR_PREFIX, plain_key, plain_name
from ..functional import Vectors
from .layer import DVoRALayer, layers_of
from .restoring import keep_values, restored_on_error
from .saving import check_unsharded, checked_folder, trained_whole

ModelOrFolder = nn.Module | str | os.PathLike[str]
"""A model with the adapter, or the folder of a saved one."""


class ModelAdapter(NamedTuple):
    """An adapter in a model, looked up once."""

    name: str
    config: DVoRAConfig
    layers: Mapping[str, DVoRALayer]
    """By the names that files have for them, in the order of a vector."""
    whole: Mapping[str, Tensor]
    """What is saved whole, not copied, in the order of a vector."""

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str) -> ModelAdapter:
        """Look an adapter up, also in a model that is compiled or wrapped."""
        base = _adapted_model(model)
        configs: Any = vars(base).get("peft_config", {})
        if adapter_name not in configs:
            raise ValueError(
                f"adapter_name: there is no adapter {adapter_name!r} in the model of type {type(base).__name__}, only "
                f"{sorted(configs)}; pass the name of one of these, or adapt the model first"
            )
        config = configs[adapter_name]
        if not isinstance(config, DVoRAConfig):
            raise TypeError(
                f"adapter_name: {adapter_name!r} in the model is an adapter of type {config.peft_type}; only DVoRA "
                "adapters are read here"
            )
        layers = {plain_name(layer.name): layer for layer in layers_of(base, adapter_name)}
        whole = {plain_key(key): value for key, value in trained_whole(base, config, adapter_name, saved=True).items()}
        return cls(adapter_name, config, dict(sorted(layers.items())), {name: whole[name] for name in sorted(whole)})

    def content(self) -> Content:
        """What it consists of."""
        adapted = [(name, layer.adapted(self.name)) for name, layer in self.layers.items()]
        return Content(
            CommonSettings.of(self.config),
            tuple(LayerSizes(name, a.out_features, a.rank, a.scaling, a.groups) for name, a in adapted),
            tuple(SavedWhole(name, tuple(tensor.shape)) for name, tensor in self.whole.items()),
            tuple((name, tuple(layer.present_fingerprint())) for name, layer in self.layers.items()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its values, detached and not copied, by name in the order of a vector, if this process has all of them."""
        vectors = {
            f"{name}{VECTOR_PREFIX}{vector}": by_adapter[self.name].detach()
            for name, layer in self.layers.items()
            for vector, by_adapter in zip(Vectors._fields, layer.vector_dicts(), strict=True)
            if self.name in by_adapter
        }
        tensors = {**vectors, **self.whole}
        check_unsharded(tensors)
        if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
            raise ValueError(f"model: {absent[0]} is on the meta device and has no values yet; load the adapter first")
        return tensors


def content_of(source: ModelOrFolder, adapter_name: str) -> Content:
    """What an adapter in a model consists of, or the one in a folder.

    Raises:
        TypeError, ValueError: it is neither, or there is no adapter of DVoRA, or a damaged one.
    """
    if isinstance(source, nn.Module):
        return ModelAdapter.of(source, adapter_name).content()
    if isinstance(source, str | os.PathLike):
        return of_dvora(Path(source)).content
    raise TypeError(f"source must be a model or the folder of an adapter, got {type(source).__name__}")


@torch.no_grad()
def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Copy the values of a saved adapter over those of a loaded one, in place.

    Parameters stay the same objects, so optimizers and compiled models keep working.

    Args:
        model: a PEFT model, compiled or not, or a model with injected adapters.
        folder: of the saved adapter, which must be made for the same layers with the same ranks, scales, direction and
            projections.
        adapter_name: of the adapter to overwrite.

    Raises:
        ValueError: the folder holds an adapter of another method, the adapters differ in more than their values, the
            adapter is merged, it is for another base, or the folder is damaged; nothing is changed.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model's own
    adapter = ModelAdapter.of(model, adapter_name)
    source = of_dvora(Path(folder))
    config = source.description.config
    if difference := adapter.content().difference(source.content):
        raise ValueError(
            f"adapter {adapter_name!r} of the model cannot take the values in {folder}: {difference}. Load them under "
            "a name of their own instead"
        )
    layers, probes = list(adapter.layers.values()), config.base_probes or {}
    warn_of_changes({x.name: change(x.fingerprint, probes[x.name]) for x in layers if x.name in probes})
    # With its own configuration: what that does not train must be the model's already, as in loading.
    base = _adapted_model(model)
    values, state = checked_folder(base, config, adapter_name, source.folder), base.state_dict()
    with restored_on_error(model) as undo:
        keep_values(undo, [state[key] for key in values])
        for key, value in values.items():
            state[key].copy_(value)
        for layer in layers:
            layer.set_strength(adapter_name, float(config.strength_of(layer.name)))
        adapter.config.strength = config.strength


def _adapted_model(model: nn.Module) -> nn.Module:
    """The model that PEFT has put adapters into, to which names in files are relative, within what is around it."""
    holder = next((module for module in model.modules() if vars(module).get("peft_config")), model)
    base: nn.Module = holder.model if isinstance(holder, BaseTuner) else holder
    return base
