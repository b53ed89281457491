"""Adapters by row over quantised bases of every library."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import dvora
from tests.peft.bases import BASES, FAMILIES, dense_twin, quantised, wide
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import same_bits, train_vectors

TARGETS = ["lin0", "lin1", "lin2"]
NAMES = ["a", None, "b", "a", None, "c"]


def x_of(kind: str) -> Tensor:
    return torch.randn(len(NAMES), 64, generator=torch.Generator().manual_seed(0)).to(BASES[kind].dtype)


def adapters(kind: str, folder: Path, **settings: object) -> dict[str, PeftModel]:
    """Trained on the quantised base, and saved."""
    made = {}
    for seed, name in enumerate("abc"):
        config = dvora.DVoRAConfig(r=8, target_modules=TARGETS, **settings)
        made[name] = get_peft_model(quantised(wide(), kind), config).eval()
        train_vectors(made[name], seed=seed)
        made[name].save_pretrained(folder / name)
    return made


@torch.no_grad()
def served(model: nn.Module, bank: dvora.AdapterBank, kind: str, names: list[str | None]) -> Tensor:
    with bank.rows(names):
        return model(x_of(kind))


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_are_those_of_the_dense_reference(kind: str, tmp_path: Path) -> None:
    made = adapters(kind, tmp_path)
    x, base = x_of(kind), BASES[kind]
    expected: dict[str | None, Tensor] = {
        name: dense_twin(model, wide(), kind)(x.double()).detach() for name, model in made.items()
    }
    model = quantised(wide(), kind).eval()
    with torch.no_grad():
        expected[None] = quantised(wide(), kind).eval()(x)
    with dvora.AdapterBank(model) as bank:
        bank.add_folder(tmp_path)
        found = served(model, bank, kind, NAMES)
        assert same_bits(found[[1, 4]], expected[None][[1, 4]])
        assert same_bits(served(model, bank, kind, [None] * len(NAMES)), expected[None])
        rows = torch.stack([expected[name][row].double() for row, name in enumerate(NAMES)])
        assert worst_difference(found, rows) < 3 * base.eval_tolerance
    with torch.no_grad():
        assert same_bits(model(x), expected[None])


def test_an_adapter_of_the_plain_base_is_refused_where_the_bases_differ_much(tmp_path: Path) -> None:
    plain = wide()
    with torch.no_grad():
        plain.lin1.weight.mul_(1.5)
    other = get_peft_model(copy.deepcopy(plain), dvora.DVoRAConfig(r=8, target_modules=TARGETS))
    train_vectors(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lin1"):
        dvora.AdapterBank(quantised(wide(), "forward_only"), like=tmp_path)
