"""How long an adapter takes to be known, to be used first, and to be used again when it has left its slot.

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
from torch import Tensor

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
Add = Callable[[str, list[float]], None]
"""Adds a row: what was done, and its seconds."""


def measure(report: Report, workload: Workload, populations: Sequence[Population], folder: Path, count: int) -> None:
    """Add rows of a bank's times, then of PEFT's, one number for each adapter.

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

    for population in populations:
        _of_bank(partial(add, "bank", population.arm), population, folder / population.arm.name, count)
    names = [name_of(number) for number in range(count)]
    for arm in LORAS:
        model = adapted(populations[0].base, arm, workload.targets)
        model.save_pretrained(str(folder / arm.name))
        _of_peft(partial(add, "PEFT", arm), model, dict.fromkeys(names, folder / arm.name))
    for population in populations:
        folders = {name: folder / population.arm.name / "adapters" / name for name in names}
        _of_peft(partial(add, "PEFT", population.arm), population.model, folders)


def _of_bank(add: Add, population: Population, folder: Path, count: int) -> None:
    parent, pack = folder / "adapters", folder / "adapters.dvora"
    folders = population.save(parent, count)
    write_pack(pack, folders)
    with ExitStack() as banks:
        _of_vectors(add, _bank(population, folders, banks), [population.vector(n) for n in range(count)])
        _of_folders(add, [_bank(population, folders, banks) for _ in range(2)], parent, folders)
        _of_pack(add, _bank(population, folders, banks), pack)
        _at_once(add, [_bank(population, folders, banks, slots=count + 1) for _ in range(AT_ONCE)], pack)


def _bank(
    population: Population, folders: Mapping[str, Path], banks: ExitStack, slots: int = SLOTS
) -> dvora.AdapterBank:
    """A bank that has computed what all adapters share, and holds another one than the folders'."""
    some = next(iter(folders.values()))
    bank = dvora.AdapterBank(sharing_copy(population.base), slots=slots, dtype=torch.float16, like=some)
    banks.callback(bank.close)
    bank.add("other", population.vector(len(folders)))
    _use(bank, "other")
    return bank


def _of_vectors(add: Add, bank: dvora.AdapterBank, vectors: Sequence[Tensor]) -> None:
    add("add a vector", [_seconds(bank.add, str(number), vector) for number, vector in enumerate(vectors)])


def _of_folders(add: Add, banks: Sequence[dvora.AdapterBank], parent: Path, folders: Mapping[str, Path]) -> None:
    at_once, later = banks
    add("add a folder", [_seconds(at_once.add, name, folder) for name, folder in folders.items()])
    add("add_folder, each", [_seconds(later.add_folder, parent) / len(folders)])
    add("first use, folder", _uses(later, folders))
    # By now the first ones have no slots any more.
    add("in memory, not in a slot", _uses(later, folders))
    *_, last = folders
    add("in a slot", _uses(later, [last] * SWITCHES))


def _of_pack(add: Add, bank: dvora.AdapterBank, pack: Path) -> None:
    start = perf_counter()
    names = bank.add_pack(pack)
    add("add_pack, each", [(perf_counter() - start) / len(names)])
    add("first use, pack", _uses(bank, names))


def _at_once(add: Add, banks: Sequence[dvora.AdapterBank], pack: Path) -> None:
    """Of each adapter in a batch in which all are new."""
    *_, names = (bank.add_pack(pack) for bank in banks)
    seconds = [_seconds(_use, bank, *names) / len(names) for bank in banks]
    add(f"first use, {len(names)} at once, pack", seconds)


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
