"""Another adapter's values copied over those of a loaded one: no new layers, no recompilation."""

from __future__ import annotations

from pathlib import Path

from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn

from ..arithmetic import strengths_as_they_are
from ..base_weight import alike, change, warn_of_changes
from ..config import DVoRAConfig, own_config
from ..expressions import check_expressions
from ..layer import DVoRALayer, check_unmerged, layers_of
from ..restoring import on_failure, values_as_they_are
from .checked_values import check_file

INSTEAD = "load the adapter under a name of its own instead"


def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Copy the values of a saved adapter over those of a loaded one, in place.

    Parameters stay the same objects, so optimizers and compiled models keep working.

    Args:
        model: a PEFT model, compiled or not, or a model with injected adapters.
        folder: of the saved adapter, which must be made for the same layers with the same ranks, scales, direction and
            projections.
        adapter_name: of the adapter to overwrite.

    Raises:
        TypeError: the folder holds an adapter of another method.
        ValueError: the adapters differ in more than their values, the adapter is merged, it is for another base, or the
            folder is damaged; nothing is changed.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model's own
    configs = model.peft_config
    assert isinstance(configs, dict)
    if adapter_name not in configs:
        raise ValueError(f"adapter_name: there is no adapter {adapter_name!r} to overwrite, only {sorted(configs)}")
    config = DVoRAConfig.from_pretrained(str(folder))
    if not isinstance(config, DVoRAConfig):
        raise TypeError(f"{folder} holds an adapter of type {config.peft_type}; only DVoRA adapters can be swapped in")
    check_file(config)
    _check_same_settings(own_config(configs[adapter_name]), config)
    check_unmerged(model, adapter_name)
    config.check_fingerprint()
    layers = layers_of(model, adapter_name)
    check_expressions(vars(config), [layer.name for layer in layers])
    for layer in layers:
        _check_same_layer(layer, adapter_name, config)
    if config.base_probes is not None and set(config.base_probes) != {layer.name for layer in layers}:
        other = sorted(set(config.base_probes) ^ {layer.name for layer in layers})[0]
        raise ValueError(f"{other} has only one of the two adapters; {INSTEAD}")
    if config.base_probes is not None:
        warn_of_changes({layer.name: change(layer.fingerprint, config.base_probes[layer.name]) for layer in layers})
    weights = load_peft_weights(str(folder), device="cpu")
    loaded = own_config(configs[adapter_name])
    own = [p for name, p in model.named_parameters() if f".{adapter_name}." in f"{name}." or name.endswith(".bias")]
    with on_failure(values_as_they_are(own), strengths_as_they_are(layers, loaded, adapter_name)):
        set_peft_model_state_dict(model, weights, adapter_name)
        for layer in layers:
            layer.set_strength(adapter_name, float(config.strength_of(layer.name)))
        loaded.strength = config.strength


def _check_same_settings(loaded: DVoRAConfig, config: DVoRAConfig) -> None:
    for setting in ("projection_seed", "projection_init", "bias", "modules_to_save", "trainable_token_indices"):
        here, there = getattr(loaded, setting), getattr(config, setting)
        if here != there:
            raise ValueError(f"{setting} is {here!r} in the model and {there!r} in the adapter; {INSTEAD}")


def _check_same_layer(layer: DVoRALayer, adapter_name: str, config: DVoRAConfig) -> None:
    adapted = layer.adapted(adapter_name)
    rank, alpha = config.rank_of(layer.name), config.alpha_of(layer.name)
    expected = {"alpha / rank": 1.0 if alpha is None else alpha / rank, "direction": config.direction}
    found = {"alpha / rank": adapted.scaling, "direction": adapted.direction}
    for setting, value in expected.items():
        if adapted.rank and found[setting] != value:
            raise ValueError(
                f"{layer.name}: {setting} is {found[setting]} in the model and {value} in the adapter; {INSTEAD}"
            )
    fingerprint = (config.base_probes or {}).get(layer.name)
    if fingerprint is not None and not alike(layer.fingerprint, fingerprint):
        raise ValueError(f"{layer.name}: the adapter in the folder was made for another base model")
