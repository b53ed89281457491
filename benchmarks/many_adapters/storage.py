"""Bytes of one adapter where it can be: on the device, on the host, in a pack, in a folder. Counted, not timed."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from benchmarks.many_adapters.plan import LORAS
from benchmarks.many_adapters.population import Population
from benchmarks.speed.arms import adapted
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload
from dvora.bank.packs import write_pack

FILES = ("adapter_config.json", "adapter_model.safetensors")
PACKED = 4
"""Adapters in the pack that is divided by their number."""


def measure(report: Report, workload: Workload, populations: Sequence[Population], folder: Path) -> None:
    """Add a row for each method.

    Args:
        report: gets the rows.
        workload: the model.
        populations: dvora's adapters for it, over one base.
        folder: an empty one.
    """
    setting = {"part": "storage", "workload": workload.name}
    for arm in LORAS:
        model = adapted(populations[0].base, arm, workload.targets)
        values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        report.rows.append({**setting, **arm.described(), **_held(values), "folder": _saved(model, folder / arm.name)})
    for population in populations:
        folders, pack = population.save(folder / population.arm.name, PACKED), folder / f"{population.arm.name}.dvora"
        write_pack(pack, folders)
        at_rest = {"folder": _size(next(iter(folders.values()))), "pack": pack.stat().st_size // PACKED}
        rows = sum(2 * layer.out_features + layer.rank for layer in population.layout.content.layers)
        report.rows.append({**setting, **population.arm.described(), **_held(rows), **at_rest})


def _held(values: int) -> dict[str, int]:
    """On the device and on the host, where an adapter is the same."""
    return {"values": values, "float16": 2 * values, "float32": 4 * values}


def _saved(model: nn.Module, folder: Path) -> int:
    model.save_pretrained(str(folder))
    return _size(folder)


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in FILES)
