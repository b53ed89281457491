"""Checks of an adapter's values before any of them is copied into a model: every one is accounted for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...method.functional import FAR, Vectors, are_finite
from ...weight.layouts import weight_at_hand
from ..adapter_folder import PEFT_PREFIX, check_dense
from ..config import DVoRAConfig, own_config
from ..layers.layer import DVoRALayer, layers_in
from ..layers.vectors import VECTORS

_VECTOR = re.compile(r"\.(" + "|".join(VECTORS) + r")(\.|$)")
_SECOND_BIAS = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")
_OF_SAVED_MODULES = re.compile(r"\.(modules_to_save|original_module)\.")


def checked_values(
    model: nn.Module,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    biases: Collection[str],
    config: DVoRAConfig,
) -> dict[str, Tensor]:
    """The entries of a loaded state dict in the model's own dtypes, checked but for their shapes.

    Only what the adapter's configuration trains is returned: what else the state dict has of the model must be what the
    model has already.

    Args:
        model: with the adapter injected.
        adapter_name: its name.
        state_dict: keys as in the model's own state dict, those of biases perhaps with PEFT's prefix.
        biases: names of the biases that the adapter trains.
        config: of the adapter.

    Raises:
        ValueError: a value is missing, belongs to nothing that the adapter trains, is not floating or not finite.
    """
    values = model.state_dict()
    own = {key for key in values if _VECTOR.search(key) and key.endswith(f".{adapter_name}")}
    trained = {*own, *biases, *_saved_whole(model, adapter_name)}
    loaded = {key if key in values else key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
    # Biases of a state dict that this program made are taken as PEFT takes them.
    made_here = config.held_for is None
    trained |= {key for key in values if made_here and key.endswith(".bias") and not _SECOND_BIAS.search(key)}
    if config.bias == "all" or made_here:
        # PEFT saves those of modules_to_save a second time, under names that loading has no use for.
        loaded = {key: value for key, value in loaded.items() if key in trained or not _SECOND_BIAS.search(key)}
    unknown = [key for key in loaded if key not in values]
    if vectors := [key for key in unknown if _VECTOR.search(key)]:
        raise ValueError(f"the adapter has vectors for layers that are not adapted here: {_some(vectors)}")
    if missing := sorted(own - loaded.keys()):
        raise ValueError(f"the adapter lacks vectors of adapted layers: {_some(missing)}")
    if missing := [key for key in biases if key not in loaded]:
        raise ValueError(f"the adapter lacks biases that its configuration trains: {_some(missing)}")
    if unknown:
        raise ValueError(
            f"the adapter's file has values that its configuration does not train: {_some(list(map(repr, unknown)))}"
        )
    for key, value in loaded.items():
        check_dense(key, value)
        if key not in trained:
            _check_same(key, value, values[key])
    return {key: _checked_value(key, value, values[key]) for key, value in loaded.items() if key in trained}


@torch.no_grad()
def check_factors(model: nn.Module, adapter_name: str, values: Mapping[str, Tensor]) -> None:
    """Refuse finite vectors that give some row no finite factors.

    Args:
        model: with the adapter injected.
        adapter_name: its name.
        values: checked, with keys as in the model's own state dict.

    Raises:
        ValueError: a layer has such vectors.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, DVoRALayer) or adapter_name not in layer.dvora_adapted:
            continue
        adapted, own = layer.adapted(adapter_name), layer.vectors(adapter_name)
        keys = (f"{path}.{vector}.{adapter_name}" for vector in VECTORS)
        loaded = Vectors(*(values.get(key, vector) for key, vector in zip(keys, own, strict=True)))
        if any(not vector.is_meta and vector.numel() and vector.abs().max() > FAR for vector in loaded):
            weight = weight_at_hand(layer.get_base_layer(), layer.parameter_name) if layer.kind.has_weight else None
            if not are_finite(adapted.factors(Vectors(*(vector.to(adapted.w) for vector in loaded)), weight)):
                raise ValueError(
                    f"{layer.name}: magnitude, lambda_b and lambda_d in the adapter are so large that outputs would "
                    "not be finite; the file is damaged or training diverged"
                )


def check_load(tuner: BaseTuner, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse to load values of other shapes than the model's; an adapter that was waiting for them has them then.

    Args:
        tuner: of the model.
        state_dict: keys as in the tuner's own state dict, each after `prefix`.
        prefix: of the tuner's keys.

    Raises:
        ValueError: a value has another shape.
    """
    names = {key.rpartition(".")[2] for key in state_dict if _VECTOR.search(key)} & tuner.peft_config.keys()
    with whole_or_absent(tuner, names):
        check_shapes(tuner, state_dict, prefix)
    for name in names:
        own_config(tuner.peft_config[name]).awaited = None


@contextmanager
def whole_or_absent(tuner: BaseTuner | None, names: Collection[str]) -> Iterator[None]:
    """Take adapters out again whose values are refused, if a load has put them into the model just before.

    Args:
        tuner: of the model; without one, as after `inject_adapter_in_model`, nobody could take them out.
        names: of the adapters.
    """
    try:
        yield
    except Exception:
        for name in () if tuner is None else names:
            assert tuner is not None
            trained = own_config(tuner.peft_config[name]).awaited
            if trained is not None and all(_is_untouched(layer, name) for layer in layers_in(tuner.model)):
                _withdraw(tuner, name)
                for parameter_name, parameter in tuner.model.named_parameters():
                    parameter.requires_grad_(parameter_name in trained)
        raise


def _is_untouched(layer: DVoRALayer, adapter_name: str) -> bool:
    """Whether an adapter of a layer is as it was made: nobody has trained it."""
    if adapter_name not in layer.dvora_adapted:
        return True
    magnitude, lambda_b, _ = layer.vectors(adapter_name)
    own = layer.adapted(adapter_name).w
    return magnitude.is_meta or (torch.equal(magnitude.to(own), own) and not lambda_b.any())


def _withdraw(tuner: BaseTuner, adapter_name: str) -> None:
    if list(tuner.peft_config) == [adapter_name]:
        tuner.unload()
        return
    tuner.delete_adapter(adapter_name)
    for path, module in list(tuner.model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, DVoRALayer) and not module.dvora_adapted:
            setattr(tuner.model.get_submodule(parent), name, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper) and not module._adapters:
            setattr(tuner.model.get_submodule(parent), name, module.original_module)


def check_shapes(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse values of other shapes than the model's, before any is copied: torch would stop half-way.

    Args:
        model: with the adapters injected.
        state_dict: keys as in the model's own state dict, each after `prefix`.
        prefix: of the model's keys.

    Raises:
        ValueError: a value has another shape.
    """
    # Base weights may be packed, and are loaded by their layers in ways of their own.
    packed = {id(tensor) for layer in layers_in(model) for tensor in layer.get_base_layer().parameters()}
    for name, own in chain(model.named_parameters(), model.named_buffers()):
        loaded = state_dict.get(prefix + name)
        if loaded is not None and loaded.shape != own.shape and (id(own) not in packed or name.endswith(".bias")):
            raise ValueError(
                f"{prefix}{name} has shape {tuple(loaded.shape)} in the adapter and {tuple(own.shape)} in the model: "
                "another base model, or another rank than the configuration says; neither can be changed by loading"
            )


def outside_saved_modules(model: nn.Module) -> dict[str, Tensor]:
    """The model's values but those of `modules_to_save`, which are loaded under names of their own."""
    return {key: value for key, value in model.state_dict().items() if not _OF_SAVED_MODULES.search(key)}


def _saved_whole(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """Of modules and tokens that the adapter saves whole."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from (f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())


def _check_same(key: str, loaded: Tensor, own: Tensor) -> None:
    """Refuse values that the adapter does not train, unless they are the model's: PEFT writes tables of embeddings."""
    # Where this process does not have them, they cannot be compared, and are left alone all the same.
    at_hand = type(own) in (Tensor, nn.Parameter) and not own.is_meta
    if at_hand and not (loaded.shape == own.shape and _same(loaded.to(own), own)):
        raise ValueError(
            f"the adapter's file has values that its configuration does not train: {key!r}, which differs from the "
            "model's own. Save a base that was changed (with further tokens, say) itself, and load the adapter onto "
            "that; or name the layer in modules_to_save or trainable_token_indices before training; or save the "
            "adapter with save_embedding_layers=False"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """To the last bit, as a table may hold what is not finite."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (a, b)))


def _checked_value(key: str, loaded: Tensor, own: Tensor) -> Tensor:
    if own.is_floating_point() and not loaded.is_floating_point():
        raise ValueError(f"{key} has dtype {loaded.dtype} in the adapter, expected a floating-point vector")
    # Cast first: a finite float64 may be infinite in the model, and there is no `isfinite` for eight bits.
    cast = loaded.to(own.dtype)
    if not cast.isfinite().all():
        raise ValueError(
            f"{key} has values that are not finite in the adapter; the file is damaged or training diverged"
        )
    return cast


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
