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
from torch import nn

import dvora
from benchmarks.many_adapters.plan import LORAS
from benchmarks.population import SETTINGS, VALUES, name_of, perturbed
from benchmarks.speed.arms import Arm, adapted, sharing_copy
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload
from dvora.adapter_file.packs import write_pack

SLOTS = 4
"""Fewer than adapters, so that each of them needs a slot anew when all are used in turns."""
SWITCHES = 20
AT_ONCE = 5
"""Banks whose first batch needs all adapters."""
Add = Callable[[str, list[float]], None]
"""Adds a row: what was done, and its seconds."""


def measure(report: Report, workload: Workload, arms: Sequence[Arm], folder: Path, count: int) -> None:
    """Add rows of sizes, of a bank's times, then of PEFT's, one number for each adapter.

    Args:
        report: gets the rows.
        workload: the model.
        arms: adapters for it.
        folder: an empty one for them.
        count: how many of each are read.
    """
    base = workload.frozen(torch.float32).eval()

    def add(way: str, arm: Arm, what: str, seconds: list[float]) -> None:
        described = {"way": way, "arm": f"{way}, {arm.name}", "method": arm.method, "rank": arm.rank}
        setting = {"part": "loading", "workload": workload.name, "dtype": "float32"}
        report.add({**setting, **described, "what": what, "seconds": seconds})

    def weigh(arm: Arm, model: nn.Module, **at_rest: int) -> None:
        """On the device and on the host an adapter is the same."""
        values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        held = {"values": values, "float16": 2 * values, "float32": 4 * values}
        report.add({"part": "storage", "workload": workload.name, **arm.described(), **held, **at_rest})

    names = [name_of(number) for number in range(count)]
    for arm in LORAS:
        model = adapted(base, arm, workload.targets)
        model.save_pretrained(str(folder / arm.name))
        weigh(arm, model, folder=_size(folder / arm.name))
        _of_peft(partial(add, "PEFT", arm), model, dict.fromkeys(names, folder / arm.name))
    for arm in arms:
        first, parent, pack = (folder / f"{arm.name}{ending}" for ending in (", first", "", ".dvora"))
        model = adapted(base, arm, workload.targets).eval()
        model.save_pretrained(str(first))
        folders = perturbed(first, parent, count)
        write_pack(pack, folders)
        weigh(arm, model, folder=_size(first), pack=pack.stat().st_size // count)
        _of_bank(partial(add, "bank", arm), base, first, parent, folders, pack)
        _of_peft(partial(add, "PEFT", arm), model, folders)


def _of_bank(add: Add, base: nn.Module, first: Path, parent: Path, folders: Mapping[str, Path], pack: Path) -> None:
    with ExitStack() as banks:

        def bank(slots: int = SLOTS) -> dvora.AdapterBank:
            """One that has computed what all adapters share, and holds another one than the folders'."""
            made = dvora.AdapterBank(sharing_copy(base), like=first, slots=slots, dtype=torch.float16)
            banks.callback(made.close)
            made.add("other", first)
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
    return sum((folder / name).stat().st_size for name in (SETTINGS, VALUES))
