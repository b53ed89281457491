"""Whole folders converted: from a folder of one method to one of another, compared before it appears."""

import json
from pathlib import Path

import pytest

from dvora.recipes.adapters.conversion import convert
from dvora.recipes.models.adapters import load_adapted, read_adapter
from dvora.recipes.models.inputs import difference, example_output
from tests.recipes.saved_adapters import adapted, save


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize(("method", "to"), [("dvora", "dora"), ("vera", "dvora")])
def test_the_converted_folder_is_an_adapter_with_the_same_outputs(
    method: str, to: str, task_type: str | None, bert: Path, tmp_path: Path
) -> None:
    model = adapted(bert, method, task_type=task_type)
    model.save_pretrained(tmp_path / "adapter")
    done = convert(tmp_path / "adapter", to, tmp_path / "converted")
    assert (done["from_method"], done["to_method"], done["base_model"]) == (method, to, str(bert))
    assert done["layers"] == 13
    assert done["difference"] is not None
    assert done["difference"] < 1e-5
    loaded = load_adapted(read_adapter(tmp_path / "converted"), str(bert))
    assert difference(example_output(loaded), example_output(model)) < 1e-5
    with model.disable_adapter():
        assert difference(example_output(loaded), example_output(model)) > 1e-4
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["inference_mode"]


def test_there_and_back_again(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "vera", "vera")
    convert(tmp_path / "vera", "dvora", tmp_path / "dvora")
    convert(tmp_path / "dvora", "dora", tmp_path / "dora")
    first, last = (load_adapted(read_adapter(tmp_path / name), str(bert)) for name in ("vera", "dora"))
    assert difference(example_output(first), example_output(last)) < 1e-5


@pytest.mark.parametrize(
    ("method", "to", "message"),
    [
        ("lora", "dvora", "only adapters of vera are converted to dvora, and this is one of lora"),
        ("vera", "dora", "only adapters of dvora are converted to dora, and this is one of vera"),
        ("dvora", "dvora", "only adapters of vera are converted to dvora, and this is one of dvora"),
        ("dvora", "lora", "is no LoRA: it rescales whole rows .* which has the rank of W itself"),
    ],
)
def test_other_pairs_are_refused(method: str, to: str, message: str, bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "adapter", method)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "adapter", to, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_what_is_there_stays_and_what_fails_leaves_nothing(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "adapter", "vera")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert(tmp_path / "adapter", "dvora", tmp_path / "full")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"projection_prng_key": 5}))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"vera_A of the adapter is not what projection_prng_key=5 gives here"):
        convert(tmp_path / "adapter", "dvora", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
