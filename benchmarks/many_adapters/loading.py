"""What an adapter takes at rest, and how long until it is used first, and used again when it has left its slot.

What is read was written just before, so it comes from the system's cache of files, not from a disk.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import dvora
from benchmarks.many_adapters.plan import LORAS
from benchmarks.many_adapters.population import Population, name_of
from benchmarks.speed.arms import Arm, adapted, sharing_copy
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload
from dvora.bank.packs import write_pack

SLOTS = 4
"""Fewer than adapters, so that each of them needs a slot anew when all are used in turns."""
SWITCHES = 20
AT_ONCE = 5
"""Banks whose first batch needs all adapters."""
FILES = ("adapter_config.json", "adapter_model.safetensors")
Add = Callable[[str, list[float]], None]
"""Adds a row: what was done, and its seconds."""


def measure(report: Report, workload: Workload, populations: Sequence[Population], folder: Path, count: int) -> None:
    """Add rows of sizes, of a bank's times, then of PEFT's, one number for each adapter.

    Args:
        report: gets the rows.
        workload: the model.
        populations: adapters of its base, which they share.
        folder: an empty one for them.
        count: how many of each are read.
    """

    def add(way: str, arm: Arm, what: str, seconds: list[float]) -> None:
        described = {"way": way, "arm": f"{way}, {arm.name}", "method": arm.method, "rank": arm.rank}
        setting = {"part": "loading", "workload": workload.name, "dtype": "float32"}
        report.add({**setting, **described, "what": what, "seconds": seconds})

    def weigh(arm: Arm, values: int, **at_rest: int) -> None:
        """On the device and on the host an adapter is the same."""
        held = {"values": values, "float16": 2 * values, "float32": 4 * values}
        report.add({"part": "storage", "workload": workload.name, **arm.described(), **held, **at_rest})

    names = [name_of(number) for number in range(count)]
    for arm in LORAS:
        model = adapted(populations[0].base, arm, workload.targets)
        model.save_pretrained(str(folder / arm.name))
        values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        weigh(arm, values, folder=_size(folder / arm.name))
        _of_peft(partial(add, "PEFT", arm), model, dict.fromkeys(names, folder / arm.name))
    for population in populations:
        parent, pack = folder / population.arm.name, folder / f"{population.arm.name}.dvora"
        folders = population.save(parent, count)
        write_pack(pack, folders)
        values = sum(2 * layer.out_features + layer.rank for layer in population.layout.content.layers)
        at_rest = {"folder": _size(folders[names[0]]), "pack": pack.stat().st_size // count}
        weigh(population.arm, values, **at_rest)
        _of_bank(partial(add, "bank", population.arm), population, parent, folders, pack)
        _of_peft(partial(add, "PEFT", population.arm), population.model, folders)


def _of_bank(add: Add, population: Population, parent: Path, folders: Mapping[str, Path], pack: Path) -> None:
    with ExitStack() as banks:

        def bank(slots: int = SLOTS) -> dvora.AdapterBank:
            """One that has computed what all adapters share, and holds another one than the folders'."""
            some = next(iter(folders.values()))
            made = dvora.AdapterBank(sharing_copy(population.base), slots=slots, dtype=torch.float16, like=some)
            banks.callback(made.close)
            made.add("other", population.vector(len(folders)))
            _use(made, "other")
            return made

        of_folders, of_pack = bank(), bank()
        of_folders.add_folder(parent)
        of_pack.add_pack(pack)
        add("first use, folder", _uses(of_folders, folders))
        # By now the first ones have no slots any more.
        add("in memory, not in a slot", _uses(of_folders, folders))
        *_, last = folders
        add("in a slot", _uses(of_folders, [last] * SWITCHES))
        add("first use, pack", _uses(of_pack, folders))
        together = [bank(slots=len(folders) + 1) for _ in range(AT_ONCE)]
        for each in together:
            each.add_pack(pack)
        seconds = [_seconds(_use, each, *folders) / len(folders) for each in together]
        add(f"first use, {len(folders)} at once, pack", seconds)


def _of_peft(add: Add, model: Any, folders: Mapping[str, Path]) -> None:
    """A first use there is `load_adapter`, and a use of another one `set_adapter`."""
    add("first use, folder", [_seconds(model.load_adapter, str(folder), name) for name, folder in folders.items()])
    add("in memory", [_seconds(model.set_adapter, name) for name in islice(cycle(folders), SWITCHES)])


def _uses(bank: dvora.AdapterBank, names: Iterable[str]) -> list[float]:
    return [_seconds(_use, bank, name) for name in names]


def _use(bank: dvora.AdapterBank, *names: str) -> None:
    with bank.rows(names):
        pass


def _seconds(step: Callable[..., object], *arguments: object) -> float:
    start = perf_counter()
    step(*arguments)
    return perf_counter() - start


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in FILES)
