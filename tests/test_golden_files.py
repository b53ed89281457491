"""Adapters that users have saved go on meaning the same: the files of `golden/` (see `golden/make.py`)."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import dvora
from dvora.adapter_file.packs import unpack, write_pack
from tests.golden.make import ANSWERS, CASES, FLAT, GOLDEN, PACKED, TENANTS, outputs, trained

SETTINGS, VALUES = "adapter_config.json", "adapter_model.safetensors"


def check_outputs(y: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest output."""
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def loaded(name: str) -> PeftModel:
    return PeftModel.from_pretrained(CASES[name].base(), str(GOLDEN / name), is_trainable=True).eval()


def answers(folder: Path) -> tuple[Tensor, Tensor]:
    kept = load_file(folder / ANSWERS)
    return kept["inputs"], kept["outputs"]


def check_same_settings(folder: Path, golden: Path) -> None:
    """The same keys and values, but for the version of PEFT and rounding in what is measured of the base."""
    again, saved = (
        {**json.loads((place / SETTINGS).read_text("utf-8")), "peft_version": None} for place in (folder, golden)
    )
    torch.testing.assert_close(again.pop("base_probes"), saved.pop("base_probes"), rtol=1e-5, atol=1e-5)
    assert again == saved


# Any warning is an error (see pyproject.toml), one about a setting that is no longer known too.
@pytest.mark.parametrize("name", CASES)
def test_a_saved_adapter_has_the_outputs_it_had(name: str) -> None:
    x, (expected,) = answers(GOLDEN / name)
    check_outputs(outputs(loaded(name), x), expected)


@pytest.mark.parametrize("name", CASES)
def test_saving_it_again_writes_the_same(name: str, tmp_path: Path) -> None:
    # Loaded for inference, as the settings say that were saved.
    PeftModel.from_pretrained(CASES[name].base(), str(GOLDEN / name)).save_pretrained(str(tmp_path))
    values, expected = load_file(tmp_path / VALUES), load_file(GOLDEN / name / VALUES)
    # Names, dtypes, shapes, and values to the last bit.
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    check_same_settings(tmp_path, GOLDEN / name)


def test_a_vector_has_its_layout_and_its_values() -> None:
    settings = json.loads((GOLDEN / "flat" / "layout.json").read_text(encoding="utf-8"))
    vector = load_file(GOLDEN / "flat" / "vector.safetensors")["vector"]
    layout = dvora.flat.Layout.from_dict(settings)
    assert json.loads(json.dumps(layout.to_dict())) == settings
    assert dvora.flat.Layout.of(GOLDEN / FLAT) == layout
    assert torch.equal(layout.to_vector(GOLDEN / FLAT), vector)
    assert torch.equal(layout.to_vector(loaded(FLAT)), vector)

    model = get_peft_model(CASES[FLAT].base(), dvora.DVoRAConfig(**CASES[FLAT].settings)).eval()
    layout.from_vector(vector, model)
    x, (expected,) = answers(GOLDEN / FLAT)
    check_outputs(outputs(model, x), expected)


def test_layouts_have_the_digests_they_had() -> None:
    digests = json.loads((GOLDEN / "flat" / "digests.json").read_text(encoding="utf-8"))
    assert {name: dvora.flat.Layout.of(GOLDEN / name).digest for name in CASES} == digests


def test_a_pack_has_the_adapters_it_had() -> None:
    x, expected = answers(GOLDEN / "packs")
    base: nn.Module = PACKED.base()
    with dvora.AdapterBank(base, like=GOLDEN / "packs" / "adapters.dvora") as bank:
        bank.add_pack(GOLDEN / "packs" / "adapters.dvora")
        assert list(bank) == list(TENANTS)
        for row, name in enumerate(TENANTS):
            with bank.rows([name] * len(x)):
                check_outputs(outputs(base, x), expected[row])
        # Each row of one batch its own.
        with bank.rows(TENANTS):
            check_outputs(outputs(base, x), torch.stack([expected[row, row] for row in range(len(TENANTS))]))
        digests = json.loads((GOLDEN / "packs" / "digests.json").read_text(encoding="utf-8"))
        assert {name: bank.digest(name) for name in TENANTS} == digests


def test_its_adapters_make_the_same_pack(tmp_path: Path) -> None:
    unpack(GOLDEN / "packs" / "adapters.dvora", tmp_path / "adapters")
    write_pack(tmp_path / "pack", {name: tmp_path / "adapters" / name for name in TENANTS})
    assert (tmp_path / "pack").read_bytes() == (GOLDEN / "packs" / "adapters.dvora").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_today_is_saved_as_then(name: str, tmp_path: Path) -> None:
    trained(CASES[name]).save_pretrained(str(tmp_path))
    # Random numbers are not the same to the last bit on every processor.
    torch.testing.assert_close(load_file(tmp_path / VALUES), load_file(GOLDEN / name / VALUES))
    check_same_settings(tmp_path, GOLDEN / name)
