"""Saved adapters: the names in their files, what is refused, and the way from a file into a model and back.

`from_saved` is the one check of values, where they arrive and whoever hands them over. For a folder it runs before,
too: `checked_folder`, when a model has been given the adapter and can still be restored. Only what would make something
large is refused before that: `check_ranks` compares a file with its settings, from the header alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapter_file.content import vector_digest
from ..adapter_file.settings import DVoRAConfig
from ..adapter_file.values_file import (
    OF_SAVED_MODULES,
    PEFT_PREFIX,
    VECTOR_PREFIX,
    Shape,
    as_bytes,
    check_dense,
    is_vector,
    layer_and_vector,
    plain_name,
    tensors_in,
)
from ..checks import FAR
from ..factors import factors_of
from ..functional import Vectors
from ..tensors import weight_in_memory
from .layer import VECTORS, DVoRALayer, layers_in, layers_of
from .layer_types import is_read
from .parameters import ParamWrapper

_SECOND_BIAS = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")
_Value = TypeVar("_Value")
_VECTOR = re.compile(r"\.(" + "|".join(VECTORS) + r")(\.|$)")


def check_ranks(config: DVoRAConfig, ranks: Mapping[str, int]) -> None:
    """Refuse ranks that no vector in the configuration's file has, before anything of that rank is made."""
    if config.file is None or (shapes := config.file.shapes()) is None:
        return
    ranks_in_file = [shape[-1:] for key, shape in shapes.items() if key.endswith(f"{VECTOR_PREFIX}lambda_d")]
    longest = max(chain((0,), *ranks_in_file))
    for name, rank in ranks.items():
        if rank > longest:
            raise ValueError(
                f"the adapter lacks vectors of adapted layers: {name} has rank {rank} in its configuration, and no "
                f"lambda_d in its file has more than {longest} values"
            )


def check_same_values(key: str, loaded: Tensor, present: Tensor) -> None:
    """Refuse values that the adapter does not train, unless they are the model's: PEFT writes tables of embeddings."""
    # Where this process does not have them, they cannot be compared, and are left alone all the same.
    at_hand = type(present) in (Tensor, nn.Parameter) and not present.is_meta
    # To the last bit, as a table may hold what is not finite.
    if at_hand and not (loaded.shape == present.shape and torch.equal(_bytes(loaded.to(present)), _bytes(present))):
        raise ValueError(
            f"the adapter's file has values that its configuration does not train: {key!r}, which differs from the "
            "model's own. Save a base that was changed (with further tokens, say) itself, and load the adapter onto "
            "that; or name the layer in modules_to_save or trainable_token_indices before training; or save the "
            "adapter with save_embedding_layers=False"
        )


@torch.no_grad()
def check_layer_factors(layer: DVoRALayer, adapter_name: str, vectors: Vectors) -> None:
    """Refuse finite vectors that give some row of a layer no finite factors."""
    if not [v for v in vectors if not v.is_meta and v.numel() and v.abs().max() > FAR]:
        return
    adapted = layer.adapted(adapter_name)
    weight = weight_in_memory(layer.get_base_layer(), layer.parameter_name) if layer.layer_type.has_weight else None
    factors = factors_of(adapted, Vectors(*(vector.to(adapted.w) for vector in vectors)), weight)
    if not factors.row.isfinite().all():
        raise ValueError(
            f"{layer.name}: magnitude, lambda_b and lambda_d in the adapter are so large that outputs would not be "
            "finite; the values are damaged or training diverged"
        )


def check_unsharded(vectors: Mapping[str, Tensor]) -> None:
    """Refuse to save the shards of vectors: gathering them here would never end where one process saves alone."""
    for key, vector in vectors.items():
        if not vector.numel() or type(vector) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{key} is sharded between the processes ({type(vector).__name__}, {tuple(vector.shape)}). Gather on "
                "every rank first: under FSDP pass state_dict=get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)) of torch.distributed.checkpoint.state_dict; under DeepSpeed ZeRO-3 save within "
                "deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )


def as_saved(model: nn.Module, config: DVoRAConfig, adapter_name: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a file: vectors by the names of their weights."""
    check_unsharded(vectors)
    config.fingerprints_to_save = {layer.name: layer.present_fingerprint() for layer in layers_of(model, adapter_name)}
    return _renamed(vectors, _saved_names(model))


class SavedValues(NamedTuple):
    """The values of a file or a state dict that an adapter trains, checked but for their shapes."""

    names: Mapping[str, str]
    """In the model, by the keys in the file."""
    values: dict[str, Tensor]
    """By their names in the model, in its dtypes."""


def from_saved(model: nn.Module, config: DVoRAConfig, adapter_name: str, entries: Mapping[str, Tensor]) -> SavedValues:
    """What of a file or a state dict an adapter trains.

    What else there is of the model must be what the model has already. Biases of a state dict that does not come from a
    folder are taken, as by PEFT.

    Args:
        model: with the adapter.
        config: of the adapter.
        adapter_name: of the adapter.
        entries: of the file, those of modules trained whole by their keys in the model.

    Raises:
        ValueError: a value is missing, belongs to nothing that the adapter trains, is not finite, or vectors give some
            row no finite factors.
    """
    paths = {name: path for path, name in _saved_names(model).items()}
    # Files carry PEFT's prefix, a model that was adapted in place does not.
    paths |= {f"{PEFT_PREFIX}{name}": f"{PEFT_PREFIX}{path}" for name, path in paths.items()}
    # PEFT renames what a dictionary has, whatever that is: here the keys themselves.
    keys: Any = _renamed({key: key for key in entries}, paths)
    keys = BaseTuner._remap_adapter_state_dict_for_load(model, config, adapter_name, keys)
    state, handed_over = model.state_dict(), config.file is None
    needed = {key: state[key] for key in state if _VECTOR.search(key) and key.endswith(f".{adapter_name}")}
    needed |= trained_whole(model, config, adapter_name)
    biases = {key: state[key] for key in state if key.endswith(".bias") and not _SECOND_BIAS.search(key)}
    names = {key: name if name in state else name.removeprefix(PEFT_PREFIX) for name, key in keys.items()}
    if config.bias == "all" or handed_over:
        # PEFT saves those of modules_to_save a second time, under names that loading has no use for.
        names = {key: name for key, name in names.items() if name in needed or not _SECOND_BIAS.search(name)}
    trained = {**biases, **needed} if handed_over else needed
    _check_names(names.values(), needed, trained, state)
    names = {key: name for key, name in names.items() if _is_trained(key, name, entries[key], trained, state)}
    values = {name: _checked_value(key, entries[key], trained[name]) for key, name in names.items()}
    for path, layer in model.named_modules():
        if isinstance(layer, DVoRALayer) and adapter_name in layer.dvora_adapted:
            present = zip(VECTORS, layer.vectors(adapter_name), strict=True)
            vectors = [values.get(f"{path}.{vector}.{adapter_name}", value) for vector, value in present]
            check_layer_factors(layer, adapter_name, Vectors(*vectors))
    return SavedValues(names, values)


def checked_folder(model: nn.Module, config: DVoRAConfig, adapter_name: str, folder: Path | None) -> dict[str, Tensor]:
    """The values in a folder by their names in the model, checked as they will be when PEFT loads them.

    PEFT loads them when the adapter is complete, and knows no way back. Until then the configuration remembers a digest
    of what was checked.

    Args:
        model: the base, with the adapter and whatever that trains whole.
        config: of the adapter, which was read.
        adapter_name: of the adapter.
        folder: without one, or if PEFT converts the names in it, nothing is read.

    Raises:
        ValueError: see `from_saved`; or a value has another shape.
    """
    if folder is None or config.file is None or (shapes := config.file.shapes()) is None:
        return {}
    layers = {layer_and_vector(key)[0] for key in shapes if is_vector(key)}
    adapted = {plain_name(layer.name) for layer in layers_of(model, adapter_name)}
    if layers and adapted.isdisjoint(map(plain_name, layers)):
        return {}
    entries = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors_in(folder).items()}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, key in module.adapter_state_dict_load_map(adapter_name).items():
                if f"{path}.{saved}" not in entries:
                    raise ValueError(
                        f"the adapter's file lacks {path}.{saved}, which its configuration trains "
                        f"(modules_to_save={config.modules_to_save!r:.200})"
                    )
                entries[f"{path}.{key}"] = entries.pop(f"{path}.{saved}")
    saved_values = from_saved(model, config, adapter_name, entries)
    check_load(model, saved_values.values)
    config.file.checked = _digest(entries), saved_values.names
    return saved_values.values


def arriving_values(
    model: nn.Module, config: DVoRAConfig, adapter_name: str, entries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What PEFT loads, by its names in the model, checked by `from_saved` unless `checked_folder` has seen the same."""
    state, checked = model.state_dict(), config.file and config.file.checked
    if config.file and checked:
        config.file.checked = None
        digest, names = checked
        by_key = {key.removeprefix(PEFT_PREFIX): value for key, value in entries.items()}
        for key, value in by_key.items():
            check_dense(key, value)
        prefix = "" if state.keys() >= set(names.values()) else PEFT_PREFIX
        names = {key: f"{prefix}{name}" for key, name in names.items()}
        # Parts of values that other processes have are no values of a file.
        is_plain = set(map(type, by_key.values())) <= {Tensor, nn.Parameter}
        if is_plain and state.keys() >= set(names.values()) and _digest(by_key) == digest:
            return {name: by_key[key].to(state[name].dtype) for key, name in names.items()}
    return from_saved(model, config, adapter_name, entries).values


def check_load(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse a state dict before any of it is copied: at a wrong shape torch would stop after copying a part."""
    for name, module in model.named_modules():
        if isinstance(module, DVoRALayer):
            module.check_loadable(state_dict, f"{prefix}{name}.")
    # Base weights may be packed, and are loaded by their layers in ways of their own.
    packed = {id(tensor) for layer in layers_in(model) for tensor in layer.get_base_layer().parameters()}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        loaded = state_dict.get(prefix + name)
        if loaded is not None and (id(tensor) not in packed or name.endswith(".bias")):
            _check_shape(prefix + name, loaded.shape, tensor.shape)


def trained_whole(model: nn.Module, config: DVoRAConfig, adapter_name: str, saved: bool = False) -> dict[str, Tensor]:
    """What an adapter in a model trains beside its vectors: heads, biases, tokens."""
    state = model.state_dict()
    # Those of `modules_to_save` are saved under names of their own.
    outside = {key: value for key, value in state.items() if not OF_SAVED_MODULES.search(key)}
    trained: dict[str, Tensor] = BaseTuner._get_learnable_bias_state_dict(model, outside, config)
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            names = module.adapter_state_dict_load_map(adapter_name)
            trained |= {f"{path}.{n if saved else key}": state[f"{path}.{key}"] for n, key in names.items()}
    return trained


def _check_names(
    names: Collection[str], needed: Collection[str], trained: Collection[str], present: Collection[str]
) -> None:
    """Refuse entries that are missing, or that neither the adapter nor the model has."""
    vectors = {name for name in names if VECTOR_PREFIX in name and (name in trained or name not in present)}
    needed_vectors = {name for name in needed if VECTOR_PREFIX in name}
    if others := vectors - needed_vectors:
        raise ValueError(f"the adapter has vectors for layers that are not adapted here: {_some(others)}")
    if missing := needed_vectors - vectors:
        raise ValueError(f"the adapter lacks vectors of adapted layers: {_some(missing)}")
    if missing := set(needed) - set(names):
        raise ValueError(f"the adapter lacks biases, heads or tokens that its configuration trains: {_some(missing)}")
    if unknown := set(names) - set(trained) - set(present):
        raise ValueError(
            f"the adapter's file has values that its configuration does not train: {_some(map(repr, unknown))}"
        )


def _is_trained(key: str, name: str, value: Tensor, trained: Collection[str], present: Mapping[str, Tensor]) -> bool:
    """Whether a value is one that the adapter trains; others are compared with the model's own."""
    check_dense(key, value)
    if name not in trained:
        check_same_values(key, value, present[name])
    return name in trained


def _checked_value(key: str, value: Tensor, present: Tensor) -> Tensor:
    """A value that an adapter trains, in the dtype that it has in the model."""
    if present.is_floating_point() and not value.is_floating_point():
        raise ValueError(f"{key} has dtype {value.dtype} in the adapter, expected a floating-point vector")
    # Cast first: a finite float64 may be infinite in the model, and there is no `isfinite` for eight bits.
    value = value.to(present.dtype)
    if not value.isfinite().all():
        raise ValueError(
            f"{key} has values that are not finite in the adapter; the file is damaged or training diverged"
        )
    return value


def _check_shape(key: str, shape: Shape, expected: Shape) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{key} has shape {tuple(shape)} in the adapter and {tuple(expected)} in the model: another base model, or "
            "another rank or lambda_d_groups than the configuration says; loading changes neither"
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _digest(entries: Mapping[str, Tensor]) -> str:
    """That of values by name."""
    names = sorted(entries)
    forms = [(name, entries[name].dtype, entries[name].shape) for name in names]
    return vector_digest(repr(forms), *[as_bytes(entries[name].cpu()) for name in names])


def _renamed(state_dict: Mapping[str, _Value], names: Mapping[str, str]) -> dict[str, _Value]:
    """The state dict with the layers in its keys under other names."""
    renamed = {}
    for key, value in state_dict.items():
        layer, prefix, rest = key.rpartition(VECTOR_PREFIX)
        renamed[f"{names[layer]}{prefix}{rest}" if layer in names else key] = value
    return renamed


def _some(keys: Iterable[str]) -> str:
    first, *others = sorted(keys)
    shown = ", ".join([first, *others[:2]])
    return shown if len(others) <= 2 else f"{shown} and {len(others) - 2} more"


def _saved_names(model: nn.Module) -> dict[str, str]:
    """How files call the wrappers of parameters, by their paths in the model.

    A wrapper's path depends on what else is wrapped; the name of its parameter does not.
    """
    wrappers = {
        # FSDP's own modules are in no key of a state dict.
        path.replace("_fsdp_wrapped_module.", ""): module
        for path, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }
    return {
        path: path.replace(".base_layer", "") + ("" if is_read(module.base_layer) else f".{module.parameter_name}")
        for path, module in wrappers.items()
    }
