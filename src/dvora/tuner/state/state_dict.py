"""What of an adapted model goes into an adapter's file, and under which names."""

from __future__ import annotations

from torch import Tensor, nn

from ...method.validation import MAX_RANK
from ..adapter_folder import MATRIX_PREFIX, PEFT_PREFIX, VECTOR_PREFIX, check_dense
from ..arithmetic import layers_of
from ..config import DVoRAConfig
from ..injecting.inject import present_probes, projections_of
from ..injecting.targets import saved_names


def as_saved(model: nn.Module, config: DVoRAConfig, adapter_name: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a file: vectors by the names of their weights, and the projections where the configuration asks.

    Args:
        model: with the adapter.
        config: of the adapter; it is told the probes of this base, which it is saved with next.
        adapter_name: of the adapter.
        vectors: by their keys in the model's state dict.

    Raises:
        ValueError: this process has a part of a vector only.
    """
    _check_whole(vectors)
    config.measured_probes = {layer.name: present_probes(layer) for layer in layers_of(model, adapter_name)}
    renamed = _renamed(vectors, saved_names(model))
    if not config.save_projection:
        return renamed
    matrices = projections_of(model, config).matrices()
    return renamed | {f"{MATRIX_PREFIX}{name}": matrix for name, matrix in matrices.items()}


def from_saved(model: nn.Module, config: DVoRAConfig, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vectors of a file by the paths of their layers in this model; its projections are checked.

    Args:
        model: with the adapter.
        config: of the adapter.
        entries: of the file.

    Raises:
        ValueError: the projections are not those of the configuration's seed.
    """
    matrices = {k.removeprefix(MATRIX_PREFIX): v for k, v in entries.items() if k.startswith(MATRIX_PREFIX)}
    for name, matrix in matrices.items():
        check_dense(name, matrix)
        if matrix.dim() and len(matrix) > MAX_RANK:
            raise ValueError(f"the saved projection matrix {name} has {len(matrix)} rows; no rank is above {MAX_RANK}")
    projections_of(model, config).check_matrices(matrices)
    rest = {k: v for k, v in entries.items() if not k.startswith(MATRIX_PREFIX)}
    paths = {name: path for path, name in saved_names(model).items()}
    # Files carry PEFT's prefix, a model that was adapted in place does not.
    paths |= {f"{PEFT_PREFIX}{name}": f"{PEFT_PREFIX}{path}" for name, path in paths.items()}
    return _renamed(rest, paths)


def _check_whole(vectors: dict[str, Tensor]) -> None:
    """Refuse parts: gathering them here would wait for ever where one process saves alone."""
    for key, vector in vectors.items():
        if not vector.numel() or type(vector) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"{key} is divided between the processes ({type(vector).__name__}, {tuple(vector.shape)}). Gather on "
                "every rank first: under FSDP pass state_dict=get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)) of torch.distributed.checkpoint.state_dict; under DeepSpeed ZeRO-3 save within "
                "deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )


def _renamed(state_dict: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The state dict with the layers in its keys under other names."""

    def renamed(key: str) -> str:
        layer, found, rest = key.rpartition(VECTOR_PREFIX)
        return f"{names[layer]}{found}{rest}" if layer in names else key

    return {renamed(key): value for key, value in state_dict.items()}
