"""The ways to serve a batch in which rows have different adapters, each as a model to be called within a context."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

import dvora
from benchmarks.many_adapters.gathered_lora import GatheredLoRA, random_factors
from benchmarks.population import name_of, perturbed
from benchmarks.speed.arms import MERGED, Arm, adapted, config_of, moved, sharing_copy
from benchmarks.speed.workloads import Workload
from dvora.adapter_file.packs import Pack, write_pack

Chosen = Callable[[], AbstractContextManager[Callable[..., Any]]]
"""Opens a context in which the model has the adapters of an arm in its rows."""


class ManyArm(NamedTuple):
    """One way to serve a batch.

    Args:
        way: "base", "merged", "bank", "adapter_names" (PEFT's), "gathered" (`gathered_lora`), or in training
            "alone" (one adapter at a time).
        adapter: method and rank.
        distinct: adapters in the batch.
        known: adapters that could have been in it.
    """

    way: str
    adapter: Arm = Arm("base")
    distinct: int = 0
    known: int = 0

    @property
    def name(self) -> str:
        """As in the result file."""
        if self.way in ("base", "merged"):
            return self.way
        return f"{self.way}, {self.adapter.name}, {self.distinct} of {self.known:,}"

    def described(self) -> dict[str, Any]:
        """For a row of the result file."""
        method, rank = self.adapter.method, self.adapter.rank
        numbers = {"distinct": self.distinct, "known": self.known}
        return {"arm": self.name, "way": self.way, "method": method, "rank": rank, **numbers}


def adapters_of_rows(arm: ManyArm, rows: int) -> list[int]:
    """Numbers of the adapters in a batch, one a row: spread evenly over those that are known, in turns."""
    return [(row % arm.distinct) * (arm.known // arm.distinct) for row in range(rows)]


class Models:
    """The models of one base, made when first asked for; arms that differ in their rows only share one.

    Args:
        workload: the base.
        dtype: of the base.
        rows: of a batch.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, rows: int) -> None:
        self.workload, self.dtype, self.rows = workload, dtype, rows
        self.base = workload.frozen(dtype).eval()
        self._made: dict[tuple[Any, ...], Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Models":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def chosen(self, arm: ManyArm) -> Chosen:
        """How to have an arm's adapters in the rows."""
        if arm.way == "base":
            return lambda: nullcontext(self.base)
        if arm.way == "merged":
            return lambda: nullcontext(self._once(self._merged))
        if arm.way.startswith("bank, half"):
            return self._in_mixed_bank(arm)
        return {"bank": self._in_bank, "adapter_names": self._by_names, "gathered": self._gathered}[arm.way](arm)

    def _in_bank(self, arm: ManyArm) -> Chosen:
        model, bank = self._once(self._bank, arm.adapter, arm.known)
        names = [name_of(number) for number in adapters_of_rows(arm, self.rows)]
        return lambda: _within(bank.rows(names), model)

    def _in_mixed_bank(self, arm: ManyArm) -> Chosen:
        model, bank = self._once(self._bank, arm.adapter, arm.known)
        self._once(self._add_lora, bank, arm.known)
        names = [name_of(number) for number in adapters_of_rows(arm, self.rows)]
        mixed = [f"lora-{name}" if row % 2 else name for row, name in enumerate(names)]
        return lambda: _within(bank.rows(mixed), model)

    def _add_lora(self, bank: dvora.AdapterBank, known: int) -> None:
        start = adapted(self.base, Arm("LoRA", 8), self.workload.targets)
        folder = Path(self._open.enter_context(TemporaryDirectory(prefix="dvora-known-")))
        with Pack.open(packed(start, known, folder)) as pack:
            for name in pack.entries:
                bank.add(f"lora-{name}", pack.source(name))

    def _by_names(self, arm: ManyArm) -> Chosen:
        model, names = self._once(self._peft, arm.adapter, arm.known)
        rows = [names[number] for number in adapters_of_rows(arm, self.rows)]
        return lambda: nullcontext(partial(model, adapter_names=rows))

    def _gathered(self, arm: ManyArm) -> Chosen:
        model, gathered = self._once(self._lora, arm.adapter, arm.known)
        rows = adapters_of_rows(arm, self.rows)
        return lambda: _within(gathered.rows(rows), model)

    def _merged(self) -> nn.Module:
        model = adapted(self.base, MERGED, self.workload.targets).eval()
        self._open.enter_context(dvora.merged(model))
        return model

    def _bank(self, adapter: Arm, known: int) -> tuple[nn.Module, dvora.AdapterBank]:
        model, start = sharing_copy(self.base), adapted(self.base, adapter, self.workload.targets)
        folder = Path(self._open.enter_context(TemporaryDirectory(prefix="dvora-known-")))
        pack = packed(start, known, folder)
        bank = dvora.AdapterBank(model, like=pack)
        self._open.callback(bank.close)
        bank.add_pack(pack)
        return model, bank

    def _peft(self, adapter: Arm, known: int) -> tuple[nn.Module, Sequence[str]]:
        return with_adapters(self.base, adapter, self.workload.targets, known)

    def _lora(self, adapter: Arm, known: int) -> tuple[nn.Module, GatheredLoRA]:
        model = sharing_copy(self.base)
        factors = random_factors(self.base, self.workload.targets, adapter.rank, known, self.dtype)
        return model, GatheredLoRA(model, factors)

    def _once(self, make: Callable[..., Any], *arguments: Any) -> Any:
        key = (make.__name__, *arguments)
        if key not in self._made:
            self._made[key] = make(*arguments)
        return self._made[key]


def with_adapters(base: nn.Module, adapter: Arm, targets: Sequence[str], count: int) -> tuple[nn.Module, Sequence[str]]:
    """A PEFT model with that many different adapters, and their names."""
    model = adapted(base, adapter, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number in range(1, count):
            model.add_adapter(name_of(number), config_of(adapter, targets))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in (".lora_", ".dvora_")))
    return moved(model).requires_grad_(False).eval(), ["default", *(name_of(number) for number in range(1, count))]


def packed(start: nn.Module, count: int, folder: Path) -> Path:
    """A pack of the adapter of a PEFT model and of others around it; their own folders are gone afterwards."""
    file = folder / "adapters.dvora"
    with TemporaryDirectory(dir=folder) as unpacked:
        first = Path(unpacked) / "first"
        start.save_pretrained(str(first))
        write_pack(file, perturbed(first, Path(unpacked) / "adapters", count))
    return file


@contextmanager
def _within(context: AbstractContextManager[Any], model: nn.Module) -> Any:
    with context:
        yield model
