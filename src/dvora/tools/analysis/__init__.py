"""What did training change? Magnitude, direction and spectrum of each layer, and how alike several adapters are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from ..dense_rebuild import adapters_of, subjects
from .measures import Change, Spectrum, change, cosines, products, spectrum

__all__ = ["Analysis", "LayerChange", "analyze"]


@dataclass(frozen=True)
class LayerChange:
    """What one adapter did to one layer.

    Args:
        layer: its name in the model.
        kind: its type: the name without what numbers it in the model.
        shape: rows and columns of its weight.
        change: how far it was moved.
        spectrum: by which singular values.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    change: Change
    spectrum: Spectrum


@dataclass(frozen=True)
class Analysis:
    """What the adapters of a model changed.

    Args:
        adapters: their names, in the order of everything else.
        changes: of each adapter, by layer.
        similarity: cosines of their whole updates, adapter by adapter.
        layer_similarity: the same for each layer, by its name.
    """

    adapters: tuple[str, ...]
    changes: tuple[tuple[LayerChange, ...], ...]
    similarity: tuple[tuple[float, ...], ...]
    layer_similarity: dict[str, tuple[tuple[float, ...], ...]]

    def correlation(self, adapter: int = 0) -> float | None:
        """Of the changes of magnitude and direction over layers; None of fewer than three, or without a spread.

        Below zero for full fine-tuning and DoRA, above for LoRA in the DoRA paper's figure 2.
        """
        points = torch.tensor([(layer.change.magnitude, layer.change.direction) for layer in self.changes[adapter]])
        if len(points) < 3 or bool((points.std(dim=0) == 0).any()):
            return None
        return float(torch.corrcoef(points.T)[0, 1])

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        layers = [
            [{"layer": row.layer, "shape": row.shape, **row.change._asdict(), **row.spectrum._asdict()} for row in rows]
            for rows in self.changes
        ]
        adapters = [
            {"name": name, "correlation": self.correlation(index), "layers": layers[index]}
            for index, name in enumerate(self.adapters)
        ]
        return {"adapters": adapters, "similarity": self.similarity, "layer_similarity": self.layer_similarity}


@torch.no_grad()
def analyze(model: PeftModel, adapters: Sequence[str] | None = None) -> Analysis:
    """Measure what adapters changed, layer by layer; one dense update an adapter is held at a time.

    Args:
        model: with LoRA, DoRA, VeRA or DVoRA adapters, which need not be active.
        adapters: names of those to look at; None: all.

    Raises:
        TypeError: the model is not of PEFT.
        ValueError: an adapter has no layer that can be rebuilt, or adapters are merged.
    """
    names = adapters_of(model, adapters)
    changes: dict[str, list[LayerChange]] = {name: [] for name in names}
    inner, by_layer = torch.zeros(len(names), len(names), dtype=torch.float64), {}
    for subject in subjects(model, names):
        weight = subject.weight()
        updates = {term.adapter: term.delta(weight) for term in subject.terms}
        for name, update in updates.items():
            moved, values = change(weight, weight + update), spectrum(weight, update)
            kind, shape = layer_type(subject.name), (weight.shape[0], weight.shape[1])
            changes[name].append(LayerChange(subject.name, kind, shape, moved, values))
        layer_products = products([updates.get(name, torch.zeros_like(weight)) for name in names]).cpu()
        by_layer[subject.name] = _rows(cosines(layer_products))
        inner += layer_products
    if empty := [name for name in names if not changes[name]]:
        raise ValueError(f"no layer of the adapter {empty[0]!r} can be rebuilt; LoRA, DoRA, VeRA and DVoRA can")
    return Analysis(names, tuple(map(tuple, changes.values())), _rows(cosines(inner)), by_layer)


def layer_type(name: str) -> str:
    """What layers of one type share: the name behind its last number, such as `attention.self.query`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers and numbers[-1] + 1 < len(parts) else parts[-1]


def _rows(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in matrix)
