"""What no graph can be made of is refused before a model is traced, in one line that names it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import dvora
from dvora.recipes.adapters.exporting import export
from tests.peft.kinds import edit_config
from tests.recipes import tiny_models
from tests.serve.served import save_classifier, save_trained


@pytest.fixture(autouse=True)
def _nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal comes in seconds: whoever traces has forgotten one."""
    torch_onnx = pytest.importorskip("torch.onnx")
    monkeypatch.setattr(torch_onnx, "export", lambda *_, **__: pytest.fail("the model was traced"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of letters."""
    return tiny_models.llama(tmp_path_factory.mktemp("bases") / "llama")


def refused(adapters: Path, base: Path, tmp_path: Path, *texts: str) -> str:
    with pytest.raises((TypeError, ValueError)) as refusal:
        export(adapters, tmp_path / "exported", "onnx", str(base), texts)
    assert not (tmp_path / "exported").exists()
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_an_adapter_of_other_classes_is_named(bert: Path, tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        save_classifier(bert, tmp_path / "adapters" / name, number, 2 if name == "b" else 3)
    message = refused(tmp_path / "adapters", bert, tmp_path)
    assert message.startswith("adapter 'b': ")
    assert "as many classes together" in message


@pytest.mark.parametrize(("settings", "said"), [({"r": 3}, "rank"), ({"projection_seed": 1}, "projection_seed")])
def test_an_adapter_of_other_settings_is_named(
    bert: Path, tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    for name, more in (("a", {}), ("b", settings), ("c", {})):
        save_trained(bert, tmp_path / "adapters" / name, 1, task_type="SEQ_CLS", **more)
    message = refused(tmp_path / "adapters", bert, tmp_path)
    assert message.startswith("adapter 'b': ")
    assert said in message
    # What only a bank can do.
    assert "allow_partial" not in message


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("dora", {}, "use_dora=True"),
        ("vera", {}, "VERA"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ("lora", {"outputs": 2}, "as many classes together"),
        ("lora", {"target_modules": ["query"], "edits": {"target_modules": "all-linear"}}, "which its settings name"),
    ],
    ids=lambda value: str(value),
)
def test_an_adapter_beside_those_of_dvora_is_named(
    bert: Path, tmp_path: Path, method: str, settings: dict[str, Any], said: str
) -> None:
    save_classifier(bert, tmp_path / "adapters" / "a", 0, 3)
    more = {key: value for key, value in settings.items() if key != "edits"}
    save_classifier(bert, tmp_path / "adapters" / "b", 0, method=method, **{"outputs": 3, **more})
    edit_config(tmp_path / "adapters" / "b", **settings.get("edits", {}))
    message = refused(tmp_path / "adapters", bert, tmp_path)
    assert message.startswith("adapter 'b': ")
    assert said in message


@pytest.mark.parametrize("name", ["null", "Null"])
def test_the_base_has_its_name_alone(bert: Path, tmp_path: Path, name: str) -> None:
    save_classifier(bert, tmp_path / "adapters" / name, 0, 3)
    assert name in refused(tmp_path / "adapters", bert, tmp_path)


def test_names_that_are_one_file_somewhere(bert: Path, tmp_path: Path) -> None:
    for name in ("films", "Films"):
        save_classifier(bert, tmp_path / "adapters" / name, 0, 3)
    message = refused(tmp_path / "adapters", bert, tmp_path)
    assert "'films'" in message
    assert "'Films'" in message


def test_a_quantised_base(bert: Path, tmp_path: Path) -> None:
    save_classifier(bert, tmp_path / "a", 0, 3)
    base = shutil.copytree(bert, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    message = refused(tmp_path / "a", base, tmp_path)
    assert f"{base} is quantised" in message
    assert "--model" in message


def test_embeddings_saved_whole(llama: Path, tmp_path: Path) -> None:
    config = dvora.DVoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "a")
    assert "embed_tokens" in refused(tmp_path / "a", llama, tmp_path)


@pytest.mark.parametrize(("text", "said"), [("x" * 65, "65 tokens"), ("", "no tokens")])
def test_texts_that_are_none_for_the_model(llama: Path, tmp_path: Path, text: str, said: str) -> None:
    save_trained(llama, tmp_path / "a", 0, task_type="CAUSAL_LM")
    assert said in refused(tmp_path / "a", llama, tmp_path, text)


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "initializer_factor": 5.0}
    T5ForConditionalGeneration(T5Config(**sizes, vocab_size=19, decoder_start_token_id=0)).save_pretrained(
        tmp_path / "t5"
    )
    config = dvora.DVoRAConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    message = refused(tmp_path / "a", tmp_path / "t5", tmp_path)
    assert "T5ForConditionalGeneration" in message
    assert "encoder-decoder" in message
