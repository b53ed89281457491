"""Merged folders: whole, like the adapted model, with a tokenizer, or not there at all."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dvora.recipes.adapters import merging
from dvora.recipes.adapters.merging import merge
from dvora.recipes.models.inputs import example_inputs, first_output
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import METHODS, adapted, save


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    return first_output(model.eval()(**example_inputs(model, rows=3, tokens=9)))


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_folder_is_the_adapted_model(method: str, bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, method, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    expected = first_output(model(**example_inputs(model.get_base_model(), rows=3, tokens=9)))
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-4)
    assert done["difference"] is not None
    assert done["difference"] < 1e-4
    assert done["files"] == sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert (done["lost_worst"] is not None) == (method == "dvora")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("good movie").input_ids == [2, 4, 10, 3]
    assert AutoConfig.from_pretrained(tmp_path / "merged").num_labels == 3


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.vit])
def test_other_kinds_of_models(make: object, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    task_type = "CAUSAL_LM" if make is tiny_models.llama else None
    save(base, tmp_path / "adapter", task_type=task_type)
    done = merge(tmp_path / "adapter", tmp_path / "merged", shard_size="20KB")
    assert done["difference"] is not None
    assert done["difference"] < 1e-4
    assert len([name for name in done["files"] if name.endswith(".safetensors")]) > 1
    wanted = "tokenizer.json" if task_type else "preprocessor_config.json"
    assert wanted in done["files"]


def test_a_classifier_on_a_language_model_gets_a_token_to_pad_with(tmp_path: Path) -> None:
    base = tiny_models.llama(tmp_path / "base")
    save(base, tmp_path / "adapter", task_type="SEQ_CLS")
    merge(tmp_path / "adapter", tmp_path / "merged")
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.pad_token_id == config.eos_token_id == 3


def test_labels_of_a_run_come_along(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "run" / "adapter", task_type="SEQ_CLS")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"labels": ["bad", "fine", "good"]}))
    merge(tmp_path / "run", tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").id2label == {0: "bad", 1: "fine", 2: "good"}


def test_another_dtype_tells_what_it_loses(bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, "dvora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda_b" in name:
                parameter.mul_(1e-2)
            if "magnitude" in name:
                layer = model.get_submodule(name.rpartition(".dvora_magnitude")[0])
                parameter.copy_(layer.adapted("default").w)
    model.save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    assert done["dtype"] == "bfloat16"
    assert done["lost_worst"] is not None
    assert done["lost_worst"] > 0.05
    assert done["warning"] is not None
    assert done["lost_layer"] is not None
    assert done["lost_layer"] in done["warning"]
    assert AutoModel.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    whole = merge(tmp_path / "adapter", tmp_path / "whole", dtype="float32")
    assert whole["warning"] is None
    assert whole["lost_worst"] is not None
    assert whole["lost_worst"] < 1e-3


def test_a_quantised_base_is_refused(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "adapter")
    config = json.loads((bert / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantised: its steps are larger .*--model"):
        merge(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "base"))


def test_a_merged_model_that_differs_is_not_kept(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(bert, tmp_path / "adapter")
    # As if rounding were forbidden altogether.
    monkeypatch.setattr(merging, "TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(RuntimeError, match=r"differs from the adapted one by .* nothing was kept"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_folder_is_refused_before_the_work(bert: Path, tmp_path: Path) -> None:
    save(bert, tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="choose another name"):
        merge(tmp_path / "adapter", tmp_path / "adapter")
    with pytest.raises(ValueError, match="unknown dtype 'int4', expected one of auto"):
        merge(tmp_path / "adapter", tmp_path / "merged", dtype="int4")
