"""Inspection of an adapter's folder, and what the folder cannot hide."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dvora.recipes.adapters.inspection import inspect
from tests.recipes.saved_adapters import METHODS, adapted, save, trained_parameters


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_named(method: str, task_type: str | None, bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, method, rank=3, task_type=task_type, target_modules=["query", "value"])
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert (found["method"], found["base_model"], found["task_type"]) == (method, str(bert), task_type)
    assert found["ranks"] == {3: 4}
    assert found["layer_count"] == 4
    assert found["targets"] == ["query", "value"]
    assert found["trained_parameters"] == trained_parameters(model)
    assert found["head_values"] == (51 if task_type else 0)
    assert found["bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found["folder_bytes"] > found["bytes"]
    assert ("layers" in found) == (method == "dvora")


@pytest.mark.parametrize("groups", [1, 3])
def test_dvora_is_described_in_detail(groups: int, bert: Path, tmp_path: Path) -> None:
    settings = {"rank_pattern": {"query": 2}, "magnitude_modules": ["value"]}
    settings |= {"projection_seed": 7, "projection_init": "kaiming_uniform", "lambda_d_groups": groups}
    save(bert, tmp_path, rank=5, target_modules=["query", "key"], **settings)
    found = inspect(tmp_path)
    assert found["ranks"] == {0: 2, 2: 2, 5: 2}
    assert found["settings"]["lambda_d_groups"] == groups
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["projections"] == {
        "distribution": "kaiming_uniform",
        "seed": 7,
        "fingerprint": config["projection_fingerprint"],
    }
    vectors = load_file(tmp_path / "adapter_model.safetensors")
    assert found["trained_parameters"] == sum(value.numel() for value in vectors.values())
    for row in found["layers"]:
        for vector in ("magnitude", "lambda_b", "lambda_d"):
            key = f"base_model.model.{row['layer']}.dvora_{vector}"
            assert (f"norm_of_{vector}" in row) == (key in vectors)
            if key in vectors:
                assert row[f"norm_of_{vector}"] == pytest.approx(vectors[key].norm().item())


@pytest.mark.parametrize("groups", [1, 3])
def test_with_the_base_the_changes_of_the_weights_are_reported(groups: int, bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, "dvora", rank=4, target_modules=["query"], lambda_d_groups=groups)
    model.save_pretrained(tmp_path)
    base = {name: value.clone() for name, value in model.get_base_model().state_dict().items()}
    merged = model.merge_and_unload().state_dict()
    for row in inspect(tmp_path, str(bert))["layers"]:
        W = base[f"{row['layer']}.base_layer.weight"].double()
        changed = merged[f"{row['layer']}.weight"].double()
        cosine = torch.nn.functional.cosine_similarity(W, changed)
        assert row["angle_mean"] == pytest.approx(cosine.arccos().rad2deg().mean().item(), rel=1e-4)
        assert row["angle_max"] == pytest.approx(cosine.arccos().rad2deg().max().item(), rel=1e-4)


def test_another_base_is_refused(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "adapter", target_modules=["query"])
    other = adapted(bert, "lora", target_modules=["query"]).merge_and_unload()
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was made for another base model"):
        inspect(tmp_path / "adapter", str(tmp_path / "other"))


def test_every_file_is_opened_once(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path)
    opened: list[str] = []
    hooked = [True]

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if hooked and event == "open" and str(arguments[0]).startswith(str(tmp_path)):
            opened.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)
    inspect(tmp_path)
    hooked.clear()
    names = [name for name in opened if name.startswith("adapter_")]
    assert sorted(names) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_folder_of_a_run_will_do(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "adapter")
    assert inspect(tmp_path)["folder"] == str(tmp_path / "adapter")


def test_pickled_values_are_refused_and_never_read(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    # A file that leaves a mark if it is unpickled.
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=r"pickled adapter_model\.bin, which can run any code"):
        inspect(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"holds no adapter_config\.json"),
        ("[]", "no table of settings"),
        ("{}", "peft_type is missing"),
        ('{"peft_type": "LORA"}', r"holds no adapter_model\.safetensors"),
    ],
)
def test_what_is_no_adapter_is_refused(settings: str | None, message: str, tmp_path: Path) -> None:
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ValueError, match=message):
        inspect(tmp_path)


def test_a_truncated_file_is_refused(bert: Path, tmp_path: Path) -> None:
    file = save(bert, tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"projection_seed": 8}, "projection_fingerprint"),
        ({"r": 7}, r"lambda_d has shape .* in the adapter and \(7,\) in its configuration"),
    ],
    ids=["seed", "rank"],
)
def test_an_edited_configuration_is_noticed(edit: dict[str, int], message: str, bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(ValueError, match=message):
        inspect(tmp_path)


def test_a_base_is_for_dvora_only(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path, "lora")
    with pytest.raises(ValueError, match="--model is for adapters of DVoRA"):
        inspect(tmp_path, str(bert))
