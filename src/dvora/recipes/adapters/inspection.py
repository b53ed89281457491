"""What an adapter is, from its folder; with its base model also how far it moves the weights."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...adapter import diagnostics
from ...peft.layer import layers_in
from ..models.adapters import Adapter, load_adapted, read_adapter

FIXED = ("base_model.vera_A", "base_model.vera_B")
"""Prefixes of the names of VeRA's fixed tensors."""
SETTINGS = ("lambda_d_groups", "direction", "alpha", "strength", "train", "bias", "dvora_dropout", "detach_norm")
MEASURES = {
    "angle_mean": "angle_degrees_mean",
    "angle_max": "angle_degrees_max",
    "norm_ratio": "norm_ratio_mean",
    "gain_distance": "gain_distance_mean",
}
"""The names of a layer's changes, and of the diagnostics that they are."""


def inspect(folder: Path, model: str | None = None) -> dict[str, Any]:
    """What the folder of an adapter, or of a run, holds, and how far the adapter moves the weights of a base model.

    Args:
        folder: of the adapter, or of a run of `dvora train`.
        model: the base, a folder or a name on the hub; None reads no model.

    Returns:
        `ranks`: how many layers have each rank, 0 for the magnitude only; `trained_parameters`: in the file, a head
        included; `head_values`: those of them in modules that are trained whole. Of DVoRA alone: `projections`, further
        `settings` that change what it computes, and numbers of each of the `layers`.

    Raises:
        TypeError, ValueError: the folder holds no adapter, a pickled or a damaged one, or it does not fit the model.
    """
    adapter = read_adapter(folder, with_values=True)
    ranks, heads = _ranks(adapter), adapter.head_shapes
    trained = {key: prod(shape) for key, shape in adapter.shapes.items() if not key.startswith(FIXED)}
    targets = adapter.settings.get("target_modules")
    facts: dict[str, Any] = {
        "folder": str(adapter.folder),
        "method": adapter.method,
        "base_model": adapter.settings.get("base_model_name_or_path"),
        "task_type": adapter.settings.get("task_type"),
        "ranks": dict(sorted(Counter(ranks.values()).items())),
        "targets": sorted(targets) if isinstance(targets, list) else targets,
        "layer_count": len(ranks),
        "trained_parameters": sum(trained.values()),
        "head_values": sum(values for key, values in trained.items() if key in heads),
        "bytes": adapter.file.stat().st_size,
        "folder_bytes": sum(path.stat().st_size for path in adapter.folder.rglob("*") if path.is_file()),
    }
    if adapter.method == "dvora":
        return facts | _of_dvora(adapter, ranks, model)
    if model is not None:
        raise ValueError(f"--model is for adapters of DVoRA; {adapter.folder} holds one of {adapter.method}")
    return facts


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The rank of every adapted layer, by its name."""
    ranks: dict[str, int] = {}
    for key, shape in adapter.shapes.items():
        name, _, vector = key.removeprefix("base_model.model.").rpartition(".")
        if vector.startswith(("dvora_", "ia3_", "road_")):
            ranks.setdefault(name, 0)
        if vector in ("dvora_lambda_d", "vera_lambda_d", "lora_embedding_A"):
            # Of lambda_d by groups it is the last dimension.
            ranks[name] = shape[0] if vector == "lora_embedding_A" else shape[-1]
        elif name.endswith(".lora_A"):
            ranks[name.removesuffix(".lora_A")] = shape[0]
    return ranks


def _of_dvora(adapter: Adapter, ranks: dict[str, int], model: str | None) -> dict[str, Any]:
    config: Any = adapter.config
    changes = {} if model is None else _changes(adapter, model)
    layers = [
        {"layer": name, "rank": rank, **_norms(adapter.values, name), **changes.get(name, {})}
        for name, rank in ranks.items()
    ]
    return {
        "projections": {
            "distribution": config.projection_init,
            "seed": config.projection_seed,
            "fingerprint": config.projection_fingerprint,
        },
        "settings": {**{name: vars(config)[name] for name in SETTINGS}, "modules_to_save": adapter.heads or None},
        "layers": layers,
    }


def _norms(values: Mapping[str, torch.Tensor], layer: str) -> dict[str, float | int]:
    """Norms of a layer's vectors: lambda_b starts at zero, lambda_d at 0.1 times the root of its length."""
    norms: dict[str, float | int] = {}
    for vector in ("magnitude", "lambda_b", "lambda_d"):
        if (tensor := values.get(f"base_model.model.{layer}.dvora_{vector}")) is not None:
            if vector == "magnitude":
                norms["outputs"] = len(tensor)
            norms[f"norm_of_{vector}"] = float(torch.linalg.vector_norm(tensor.double()))
    return norms


def _changes(adapter: Adapter, model: str) -> dict[str, dict[str, float]]:
    """How far each layer's weight was moved, by the layer's name."""
    changes = {}
    for layer in layers_in(load_adapted(adapter, model)):
        weight = layer.unmerged() if layer.layer_type.has_weight else None
        measured = diagnostics(layer.adapted("default"), layer.vectors("default"), weight)
        changes[layer.name] = {name: measured[measure] for name, measure in MEASURES.items()}
    return changes
