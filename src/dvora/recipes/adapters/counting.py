"""How much each method trains, saves and keeps for the optimizer, from a model's configuration alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from ...peft.layer_types import LAYER_TYPES
from ..models.bases import config_of, heads_of, model_class, quiet_transformers, without_memory

RANKS: Mapping[str, tuple[int | None, ...]] = {
    "dvora": (64, 256, 1024),
    "vera": (64, 256, 1024),
    "lora": (1, 8, 16),
    "dora": (1, 8, 16),
    "head": (None,),
    "full": (None,),
}
"""The methods, and ranks that are usual for each. LoRA r=1 is as small as DVoRA is."""
_CONFIGS: Mapping[str, Callable[..., PeftConfig]] = {
    "vera": VeraConfig,
    "lora": LoraConfig,
    "dora": lambda **options: LoraConfig(use_dora=True, **options),
}
Shapes = dict[str, tuple[int, ...]]
VALUE_BYTES = 4
"""Everything trained is kept in float32."""
OPTIMIZER_VALUES = 2
"""AdamW keeps two values for each trained parameter."""


def count(
    source: str,
    targets: Sequence[str] = (),
    ranks: Sequence[int] = (),
    task_type: str | None = None,
    labels: int | None = None,
) -> dict[str, Any]:
    """Trained parameters and bytes of every method; only the configuration is read, nothing is allocated.

    Args:
        source: a folder, or the name of a model on the hub.
        targets: names of the layers to adapt; none means all linear layers.
        ranks: to count with; none means those that are usual for each method.
        task_type: PEFT's name of the task; None keeps the class that the model was saved with.
        labels: outputs of the head; None keeps the model's.

    Returns:
        model, architecture, parameters: of the model.
        targets, layers: names of the adapted layers, without their places, and how many they are.
        heads: the modules that are trained whole.
        counts: of each method and rank: `method`, `rank` (None where there is none), `trained` parameters, a head
            included, and their `share` of the model's, `file_bytes` of the saved adapter (of all weights for "full"),
            `optimizer_bytes` that AdamW keeps, and a `note` on what the numbers leave out, or why there are none.

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
    heads = heads_of(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    head = {name: shape for name, shape in shapes.items() if name.split(".")[0] in heads}
    # PEFT adapts a linear head that it also trains whole, unless it is left out.
    excluded = [name for name, _ in model.named_modules() if name.split(".")[0] in heads]
    lora = LoraConfig(r=1, target_modules=list(targets) or "all-linear", exclude_modules=excluded or None)
    layers = {
        name.removeprefix("base_model.model."): layer.get_base_layer()
        for name, layer in _adapted(without_memory(make, config), lora).named_modules()
        if isinstance(layer, LoraLayer)
    }

    def saved(method: str, rank: int | None) -> Shapes:
        if method == "full":
            return shapes
        if method == "head" and not head:
            raise ValueError("the model has no head of its own to train; choose a task")
        if rank is None:
            return head
        if method == "dvora":
            # DVoRA measures weights, which the meta device has not.
            return _of_dvora(layers, rank) | {f"base_model.model.{name}": shape for name, shape in head.items()}
        options = {"r": rank, "target_modules": list(layers), "modules_to_save": heads or None}
        adapted = _adapted(without_memory(make, config), _CONFIGS[method](**options))
        with quiet_transformers():
            values = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return {name: tuple(value.shape) for name, value in values.items()}

    total = sum(map(prod, shapes.values()))
    counts = []
    for method, usual in RANKS.items():
        for rank in ranks if ranks and usual != (None,) else usual:
            row = dict.fromkeys(("trained", "share", "file_bytes", "optimizer_bytes", "note"))
            try:
                row |= _sizes(saved(method, rank), total)
            except (TypeError, ValueError) as error:
                # PEFT's own words for layers of a type that a method has not.
                row["note"] = str(error)
            counts.append({"method": method, "rank": rank, **row})
    return {
        "model": source,
        "architecture": type(model).__name__,
        "parameters": total,
        "targets": sorted({name.rpartition(".")[2] for name in layers}),
        "layers": len(layers),
        "heads": heads,
        "counts": counts,
    }


def _sizes(saved: Shapes, total: int) -> dict[str, Any]:
    trained = {name: shape for name, shape in saved.items() if not name.startswith("base_model.vera_")}
    values = sum(map(prod, trained.values()))
    return {
        "trained": values,
        "share": values / total,
        "file_bytes": file_bytes(saved),
        "optimizer_bytes": OPTIMIZER_VALUES * VALUE_BYTES * values,
        "note": "" if saved == trained else f"with save_projection=False: {file_bytes(trained):,} bytes",
    }


def file_bytes(shapes: Shapes) -> int:
    """Size of a safetensors file with float32 values: a length, a header, and the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + VALUE_BYTES * prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + end


def _adapted(model: nn.Module, config: PeftConfig) -> nn.Module:
    """The model with PEFT's adapter: on the meta device it costs nothing."""
    with torch.device("meta"), quiet_transformers():
        return get_peft_model(model, config)


def _of_dvora(layers: Mapping[str, nn.Module], rank: int) -> Shapes:
    shapes: Shapes = {}
    for name, layer in layers.items():
        kind = next((kind for layer_type, kind in LAYER_TYPES.items() if isinstance(layer, layer_type)), None)
        if kind is None:
            raise ValueError(f"{name} of type {type(layer).__name__} is not counted for DVoRA")
        out_features = kind.layout.matrix(layer.get_parameter("weight")).shape[0]
        vectors = {"magnitude": (out_features,), "lambda_b": (out_features,), "lambda_d": (rank,)}
        shapes |= {f"base_model.model.{name}.dvora_{vector}": shape for vector, shape in vectors.items()}
    return shapes
