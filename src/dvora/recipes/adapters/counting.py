"""How much each method trains, saves and keeps for the optimizer, from a model's configuration alone."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from ...peft.layer_types import LAYER_TYPES
from ..models.architectures import config_of, heads_of, model_class, quietly, without_memory

METHODS = ("dvora", "vera", "lora", "dora", "head", "full")
RANKS: Mapping[str, tuple[int, ...]] = {
    "dvora": (16, 256, 1024),
    "vera": (16, 256, 1024),
    "lora": (4, 8, 16),
    "dora": (4, 8, 16),
}
"""Ranks that are usual for a method."""

Shapes = dict[str, tuple[int, ...]]
VALUE_BYTES = 4
"""Everything trained is kept in float32."""
OPTIMIZER_VALUES = 2
"""AdamW keeps two values for each trained parameter."""


@dataclass(frozen=True)
class Count:
    """What one method costs.

    Args:
        method: its name.
        rank: of the update; None where there is none.
        trained: parameters, a head included.
        share: of the model's own parameters.
        file_bytes: of the saved adapter; of all weights for "full".
        optimizer_bytes: what AdamW keeps.
        note: what the numbers leave out, or why there are none.
    """

    method: str
    rank: int | None
    trained: int | None
    share: float | None
    file_bytes: int | None
    optimizer_bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class Counted:
    """A model and what every method would train of it."""

    model: str
    architecture: str
    parameters: int
    targets: list[str]
    layers: int
    heads: list[str]
    counts: list[Count]


def count(
    source: str,
    targets: Sequence[str] = (),
    ranks: Sequence[int] = (),
    task_type: str | None = None,
    labels: int | None = None,
) -> Counted:
    """Trained parameters and bytes of every method; only the configuration is read, nothing is allocated.

    Args:
        source: a folder, or the name of a model on the hub.
        targets: names of the layers to adapt; none means all linear layers.
        ranks: to count with; none means those that are usual for each method.
        task_type: PEFT's name of the task; None keeps the class that the model was saved with.
        labels: outputs of the head; None keeps the model's.

    Raises:
        ValueError: there is no such model, a rank is no rank, or no layer has such a name.
    """
    if wrong := [rank for rank in ranks if rank < 1]:
        raise ValueError(f"ranks must be positive, got {wrong[0]}")
    config = config_of(source)
    if labels is not None:
        config.num_labels = labels
    make = model_class(config, task_type)
    model = without_memory(make, config)
    heads, total = heads_of(model), sum(p.numel() for p in model.parameters())
    layers = targeted_layers(without_memory(make, config), list(targets), heads)
    head_shapes = _saved_whole(model, heads)
    counts = []
    for method in METHODS:
        for rank in (*ranks,) or RANKS.get(method, ()) if method in RANKS else (None,):
            counts.append(_count(method, rank, layers, head_shapes, lambda: without_memory(make, config), total))
    names = sorted({name.rpartition(".")[2] for name in layers})
    return Counted(source, type(model).__name__, total, names, len(layers), heads, counts)


def targeted_layers(model: nn.Module, targets: list[str], heads: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that PEFT would adapt, by name.

    Args:
        model: which is changed.
        targets: names; none means all linear layers.
        heads: modules that are trained whole.

    Raises:
        ValueError: no layer has such a name.
    """
    adapted = _with_lora(model, targets, heads, rank=1, dora=False)
    return {
        name: layer.get_base_layer()
        for name, layer in adapted.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def vectors_of(method: str, layers: Mapping[str, nn.Module], rank: int) -> Shapes:
    """Shapes of the vectors of DVoRA or VeRA, by their names in a file.

    Raises:
        ValueError: the method does not have a layer's type.
    """
    shapes: Shapes = {}
    for name, layer in layers.items():
        rows = _rows(layer, name)
        if method == "vera" and not _is_linear(layer):
            raise ValueError(f"VeRA has linear layers only, and {name} is of type {type(layer).__name__}")
        vectors = {"lambda_b": (rows,), "lambda_d": (rank,)} | ({"magnitude": (rows,)} if method == "dvora" else {})
        prefix = "vera_" if method == "vera" else "dvora_"
        shapes |= {f"base_model.model.{name}.{prefix}{vector}": shape for vector, shape in vectors.items()}
    return shapes


def file_bytes(shapes: Shapes) -> int:
    """Size of a safetensors file with float32 values: a length, a header, and the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + VALUE_BYTES * prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + end


def _count(
    method: str,
    rank: int | None,
    layers: Mapping[str, nn.Module],
    heads: Shapes,
    fresh: Callable[[], nn.Module],
    total: int,
) -> Count:
    note = ""
    try:
        if method == "full":
            shapes = {name: tuple(p.shape) for name, p in fresh().named_parameters()}
            trained = shapes
        elif method == "head":
            if not heads:
                raise ValueError("the model has no head of its own to train; choose a task")
            shapes = trained = {name.removeprefix("base_model.model."): shape for name, shape in heads.items()}
        else:
            assert rank is not None
            trained = {**_adapter(method, layers, rank, fresh, heads), **heads}
            matrices = _vera_matrices(layers, rank) if method == "vera" else {}
            shapes = trained | matrices
            if matrices:
                note = f"PEFT saves the random matrices too; {file_bytes(trained):,} bytes with save_projection=False"
    except ValueError as error:
        return Count(method, rank, None, None, None, None, str(error))
    values = sum(map(prod, trained.values()))
    optimizer = OPTIMIZER_VALUES * VALUE_BYTES * values
    return Count(method, rank, values, values / total, file_bytes(shapes), optimizer, note)


def _adapter(
    method: str, layers: Mapping[str, nn.Module], rank: int, fresh: Callable[[], nn.Module], heads: Shapes
) -> Shapes:
    if method in ("dvora", "vera"):
        return vectors_of(method, layers, rank)
    adapted = _with_lora(fresh(), list(layers), (), rank, dora=method == "dora")
    with quietly():
        values = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in values.items()}


def _with_lora(model: nn.Module, targets: list[str], heads: Sequence[str], rank: int, dora: bool) -> Any:
    """PEFT's own choice of layers, and its own shapes: on the meta device they cost nothing."""
    config = LoraConfig(
        r=rank, target_modules=targets or "all-linear", modules_to_save=list(heads) or None, use_dora=dora
    )
    with torch.device("meta"), quietly():
        # PEFT adapts a linear head that it also trains whole, unless it is left out.
        config.exclude_modules = _under(model, heads)
        return get_peft_model(model, config)


def _under(model: nn.Module, heads: Sequence[str]) -> list[str] | None:
    return [name for name, _ in model.named_modules() if name.split(".")[0] in heads] or None


def _saved_whole(model: nn.Module, heads: Sequence[str]) -> Shapes:
    return {
        f"base_model.model.{name}": tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.split(".")[0] in heads
    }


def _vera_matrices(layers: Mapping[str, nn.Module], rank: int) -> Shapes:
    sizes = [_matrix_shape(layer, name) for name, layer in layers.items()]
    largest_in, largest_out = max(columns for _, columns in sizes), max(rows for rows, _ in sizes)
    return {"base_model.vera_A": (rank, largest_in), "base_model.vera_B": (largest_out, rank)}


def _matrix_shape(layer: nn.Module, name: str) -> tuple[int, int]:
    for layer_type, kind in LAYER_TYPES.items():
        if isinstance(layer, layer_type):
            rows, columns = kind.layout.matrix(layer.get_parameter("weight")).shape
            return rows, columns
    raise ValueError(f"{name} of type {type(layer).__name__} is not counted for DVoRA and VeRA")


def _rows(layer: nn.Module, name: str) -> int:
    return _matrix_shape(layer, name)[0]


def _is_linear(layer: nn.Module) -> bool:
    linear: Iterator[type[nn.Module]] = (
        kind for kind in LAYER_TYPES if "Linear" in kind.__name__ or "1D" in kind.__name__
    )
    return isinstance(layer, tuple(linear))
