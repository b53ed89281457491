"""Adapters by row over quantised bases of every library."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import dvora
from tests.peft.bases import BASES, FAMILIES, dense_twin, quantised, wide
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import same_bits, train_vectors

TARGETS = ["lin0", "lin1", "lin2"]
NAMES = ["a", None, "b", "a", None, "c"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_are_those_of_the_dense_reference(kind: str, tmp_path: Path) -> None:
    x = torch.randn(len(NAMES), 64, generator=torch.Generator().manual_seed(0)).to(BASES[kind].dtype)
    with torch.no_grad():
        expected: dict[str | None, Tensor] = {None: quantised(wide(), kind).eval()(x)}
    for seed, name in enumerate("abc"):
        # Trained on the quantised base.
        model = get_peft_model(quantised(wide(), kind), dvora.DVoRAConfig(r=8, target_modules=TARGETS)).eval()
        train_vectors(model, seed=seed)
        model.save_pretrained(tmp_path / name)
        expected[name] = dense_twin(model, wide(), kind)(x.double()).detach()
    base = quantised(wide(), kind).eval()
    with dvora.AdapterBank(base) as bank, torch.no_grad():
        bank.add_folder(tmp_path)
        with bank.rows(NAMES):
            found = base(x)
        with bank.rows([None] * len(NAMES)):
            assert same_bits(base(x), expected[None])
    assert same_bits(found[[1, 4]], expected[None][[1, 4]])
    rows = torch.stack([expected[name][row].double() for row, name in enumerate(NAMES)])
    assert worst_difference(found, rows) < 3 * BASES[kind].eval_tolerance
    with torch.no_grad():
        assert same_bits(base(x), expected[None])
