"""Between an adapted model and an adapter's file: what goes into it, under which names, and back."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..adapter_folder import MATRIX_PREFIX, PEFT_PREFIX, VECTOR_PREFIX
from ..config import DVoRAConfig
from ..layer import layers_of, shared_projections
from ..parameters import saved_names
from .checked_values import check_matrices, check_whole, checked_values, outside_saved_modules


def as_saved(model: nn.Module, config: DVoRAConfig, adapter_name: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a file: vectors by the names of their weights, and the projections where the configuration asks.

    Args:
        model: with the adapter.
        config: of the adapter; the fingerprints of this base are set, to be saved with it.
        adapter_name: of the adapter.
        vectors: by their keys in the model's state dict.

    Raises:
        ValueError: this process has only a shard of a vector.
    """
    check_whole(vectors)
    config.fingerprints_to_save = {layer.name: layer.present_fingerprint() for layer in layers_of(model, adapter_name)}
    renamed = _renamed(vectors, saved_names(model))
    if not config.save_projection:
        return renamed
    matrices = shared_projections(model, config.projection_seed, config.projection_init).saved_tensors()
    return renamed | {f"{MATRIX_PREFIX}{name}": matrix for name, matrix in matrices.items()}


def from_saved(
    model: nn.Module, config: DVoRAConfig, adapter_name: str, entries: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The entries of a file by their keys in the model's state dict, checked but for their shapes.

    Args:
        model: with the adapter.
        config: of the adapter.
        adapter_name: of the adapter.
        entries: of the file.

    Raises:
        ValueError: the projections are not those of the configuration's seed, or a value is missing, not trained by
            the configuration, or not finite.
    """
    matrices = {k.removeprefix(MATRIX_PREFIX): v for k, v in entries.items() if k.startswith(MATRIX_PREFIX)}
    projections = shared_projections(model, config.projection_seed, config.projection_init)
    check_matrices(matrices, projections)
    rest = {k: v for k, v in entries.items() if not k.startswith(MATRIX_PREFIX)}
    paths = {name: path for path, name in saved_names(model).items()}
    # Files carry PEFT's prefix, a model that was adapted in place does not.
    paths |= {f"{PEFT_PREFIX}{name}": f"{PEFT_PREFIX}{path}" for name, path in paths.items()}
    values = BaseTuner._remap_adapter_state_dict_for_load(model, config, adapter_name, _renamed(rest, paths))
    biases = BaseTuner._get_learnable_bias_state_dict(model, outside_saved_modules(model), config)
    return checked_values(model, adapter_name, values, biases.keys(), config)


def _renamed(state_dict: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The state dict with the layers in its keys under other names."""

    def renamed(key: str) -> str:
        layer, found, rest = key.rpartition(VECTOR_PREFIX)
        return f"{names[layer]}{found}{rest}" if layer in names else key

    return {renamed(key): value for key, value in state_dict.items()}
