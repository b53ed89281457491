"""Bytes of one adapter where it can be: on the device, on the host, in a pack, in a folder. Counted, not timed."""

from pathlib import Path

import torch
from torch import nn

from benchmarks.many_adapters.plan import LORAS
from benchmarks.many_adapters.population import Population
from benchmarks.speed.arms import adapted
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload
from dvora.bank.factors import FactorRows

FILES = ("adapter_config.json", "adapter_model.safetensors")
PACKED = 4
"""Adapters in the pack that is divided by their number."""


def measure(report: Report, workload: Workload, population: Population, folder: Path) -> None:
    """Add a row for each method.

    Args:
        report: gets the rows.
        workload: the model.
        population: dvora's adapters for it.
        folder: an empty one.
    """
    setting = {"part": "storage", "workload": workload.name}
    for arm in LORAS:
        model = adapted(population.base, arm, workload.targets)
        values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        report.rows.append({**setting, **arm.described(), **_held(values), "folder": _saved(model, folder / arm.name)})
    content, config = population.layout.content, population.config
    rows = FactorRows.of_model(population.base, config, content, torch.float16)
    folders = population.save(folder / "dvora", PACKED)
    with_rows, without = (
        population.pack(folder / f"{dtype}.dvora", folders, dtype).stat().st_size // PACKED
        for dtype in (torch.float16, None)
    )
    packed = {"pack": with_rows, "pack_without_factors": without}
    at_rest = {"folder": _size(next(iter(folders.values()))), **packed}
    report.rows.append({**setting, **population.arm.described(), **_held(rows.width), **at_rest})


def _held(values: int) -> dict[str, int]:
    """On the device and on the host, where an adapter is the same."""
    return {"values": values, "float16": 2 * values, "float32": 4 * values}


def _saved(model: nn.Module, folder: Path) -> int:
    model.save_pretrained(str(folder))
    return _size(folder)


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in FILES)
