"""How many kernels a layer launches in a bank does not depend on how many adapters a batch has, or the bank holds."""

from pathlib import Path

import pytest
import torch

import dvora
from benchmarks.kernel_count import kernels
from tests.bank.tenants import HEADED, LLAMA, Served, tenants, vectors_of
from tests.peft.kinds import GROUPS, Kind, saved
from tests.peft.tiny import inputs

ROWS, ADAPTERS = 16, 24
LIMIT = {1: 12, 2: 18, GROUPS: 24}
"""Beyond the base, of a layer, at most, by groups: those of different sizes are multiplied one by one."""


def bank_of(kind: Kind, folder: Path, slots: int) -> Served:
    """Of many adapters, all of them vectors."""
    model = kind.base().requires_grad_(False)
    bank = dvora.AdapterBank(model, slots=slots, like=saved(kind.trained(), folder))
    for number, vector in enumerate(vectors_of(kind, ADAPTERS)):
        bank.add(str(number), vector)
    return Served(model, bank)


def counted(served: Served, distinct: int) -> int:
    """Kernels of a batch with so many different adapters; 0 is the base alone."""
    names = [str(row % distinct) if distinct else None for row in range(ROWS)]
    batch = inputs(served.model, len(names))
    with torch.no_grad(), served.bank.rows(names):
        return kernels(lambda: served.model(**batch)).total()


@pytest.mark.parametrize("groups", LIMIT)
def test_kernels_do_not_depend_on_the_number_of_adapters(groups: int, tmp_path: Path) -> None:
    kind = LLAMA.by_groups(groups)
    plain = kind.base()
    with torch.no_grad():
        base = kernels(lambda: plain(**inputs(plain, ROWS))).total()
    served = bank_of(kind, tmp_path, ADAPTERS)
    first = counted(served, 1)
    assert {counted(served, distinct) for distinct in (2, 5, 16)} == {first}
    assert counted(served, 0) < first
    assert counted(bank_of(kind, tmp_path / "few", ROWS), 16) == first
    assert first - base <= LIMIT[groups] * 6


def test_heads_too(tmp_path: Path) -> None:
    served = bank_of(HEADED, tmp_path, ADAPTERS)
    counted(served, 1)
    assert len({counted(served, distinct) for distinct in (1, 3, 16)}) == 1


def test_a_batch_gathers_once_for_the_whole_model(tmp_path: Path) -> None:
    these = tenants(LLAMA, tmp_path, 2)
    with these.bank() as served, torch.no_grad():
        batch = inputs(served.model, 4)
        with served.bank.rows(["a", "b", None, "a"]):
            first, second = (kernels(lambda: served.model(**batch)) for _ in range(2))
    assert (first["aten.index_select.default"], second["aten.index_select.default"]) == (1, 0)
