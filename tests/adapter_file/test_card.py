"""The README.md of a saved adapter: its code loads it, and what PEFT and the user write there stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from dvora import DVoRAConfig
from tests.peft.tiny import LAYERS, MODELS, bert, outputs, train_vectors


def adapted(adapter_name: str = "default", name_or_path: str | None = None) -> PeftModel:
    base: Any = bert()
    if name_or_path is not None:
        base.config._name_or_path = base.name_or_path = name_or_path
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=LAYERS["bert"]), adapter_name)
    train_vectors(model)
    return model.eval()


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("adapter_name", ["default", "customer"])
def test_its_code_loads_the_adapter(tmp_path: Path, adapter_name: str) -> None:
    model = adapted(adapter_name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    code = card(folder).text.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import dvora")
    names: dict[str, Any] = {"base": bert()}
    exec(code.replace('"NAME"', repr(str(folder))), names)
    assert torch.equal(outputs(names["model"].eval()), outputs(model))


def test_what_the_hub_reads(tmp_path: Path) -> None:
    adapted(name_or_path="some-one/some-bert").save_pretrained(tmp_path, save_embedding_layers=False)
    data = card(tmp_path).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == "some-one/some-bert"
    assert {"dvora", "base_model:adapter:some-one/some-bert"} <= set(data["tags"])
    assert "license" not in data


@pytest.mark.parametrize("path", ["/home/some one/bert", "here/bert"])
def test_a_folder_of_this_machine_is_not_named(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/bert").mkdir(parents=True)
    adapted(name_or_path=path).save_pretrained("saved", save_embedding_layers=False)
    assert path not in Path("saved/README.md").read_text(encoding="utf-8")
    assert "base_model" not in card(Path("saved")).data.to_dict()


def test_what_the_user_wrote_stays_however_often_it_is_saved(tmp_path: Path) -> None:
    model = adapted()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nOf films.\n", encoding="utf-8")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card(tmp_path).data["license"] == "mit"
    assert first.index("# Mine\n") < first.index("## How to load it") < first.index("Of films.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == first


def test_settings_alone_are_no_adapter(tmp_path: Path) -> None:
    DVoRAConfig(r=4).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_model_that_is_none_of_transformers(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"]))
    model.save_pretrained(tmp_path)
    data = card(tmp_path).data.to_dict()
    assert data["tags"] == ["dvora"]
    assert "base_model" not in data
