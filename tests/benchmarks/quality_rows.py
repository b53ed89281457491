"""Made-up rows of the grids: final runs with known items, and trials with known losses."""

from typing import Any

import numpy as np

from benchmarks.quality.items import packed

ITEMS = 50


def final(task: str, arm: str, seed: int, items: np.ndarray, steps: int = 10, **more: Any) -> dict[str, Any]:
    rates = {"adapter": 0.01, "magnitude": None, "head": 0.001} if steps else None
    return {
        "key": f"{task} {arm} final {seed}",
        **{"task": task, "arm": arm, "stage": "final", "seed": seed, "steps": steps, "rates": rates, "seconds": 1.0},
        **{"validation": {"loss": 0.7, "score": 0.5}, "test": {"loss": 0.7, "score": float(np.mean(items))}},
        **{"test_items": len(items), "items": packed(items), "trained_values": 1234, "saved_bytes": 5678},
        **more,
    }


def trial(task: str, arm: str, rate: float, loss: float | None, magnitude: float | None = None) -> dict[str, Any]:
    return {
        "key": f"{task} {arm} trial {rate}/{magnitude}",
        **{"task": task, "arm": arm, "stage": "trial", "seed": 100, "steps": 10, "seconds": 1.0},
        "rates": {"adapter": rate, "magnitude": magnitude, "head": 0.001},
        "validation": None if loss is None else {"loss": loss, "score": 0.5},
    }


def right(count: int) -> np.ndarray:
    """So many items right, the first ones."""
    return np.arange(ITEMS) < count
