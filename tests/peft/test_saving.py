"""Saved adapters: what a file has, that loading it gives the same bits, and what state dicts are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from dvora import DVoRAConfig
from tests.peft.kinds import KINDS, WEIGHTS, edit_weights, save_bert, saved
from tests.peft.tiny import LAYERS, MODELS, bert, dvora_layers, outputs, same_bits, train_vectors


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    config = DVoRAConfig(**{"r": 6, "target_modules": LAYERS[name], **options})
    model = get_peft_model(MODELS[name]().to(dtype), config)
    train_vectors(model)
    return model.eval()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# That outputs are the same to the last bit, for every layer type: `test_support.py`.
@pytest.mark.parametrize("name", KINDS)
def test_all_that_is_trained_is_loaded_and_saved_again_in_an_equal_file(name: str, tmp_path: Path) -> None:
    model = KINDS[name].trained()
    model.save_pretrained(tmp_path / "first", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(KINDS[name].base(), tmp_path / "first", is_trainable=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert all(same_bits(loaded.get_parameter(n), p) for n, p in trained.items())
    loaded.save_pretrained(tmp_path / "second", save_embedding_layers=False)
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_three_vectors_a_layer_and_nothing_else(name: str, groups: int, tmp_path: Path) -> None:
    model = adapted(name, projection_init="kaiming_uniform", lambda_d_groups=groups)
    model.save_pretrained(tmp_path)
    assert set(files(tmp_path)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    expected = {}
    for layer_name, layer in dvora_layers(model):
        rows, of_columns = (layer.out_features,), (6,) if groups == 1 else (3, 6)
        for vector, shape in (("magnitude", rows), ("lambda_b", rows), ("lambda_d", of_columns)):
            expected[f"base_model.model.{layer_name}.dvora_{vector}"] = shape
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(value.shape) for key, value in saved.items()} == expected
    assert {value.dtype for value in saved.values()} == {torch.float32}
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    norms = {n: float(layer.get_base_layer().weight.norm()) for n, layer in dvora_layers(model)}
    assert {n: probes[0] for n, probes in settings["base_probes"].items()} == pytest.approx(norms, rel=1e-3)
    assert settings["projection_format"] == 1
    # Files of one group are as they were before there were groups.
    assert settings.get("lambda_d_groups") == (None if groups == 1 else 3)
    assert settings["target_modules"] == sorted(LAYERS[name])
    assert settings["inference_mode"] is True


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"bias": "all"}, {"bias": "all"}),
        ({"bias": "dvora_only"}, {"bias": "lora_only"}),
        ({"modules_to_save": ["classifier"]}, {"modules_to_save": ["classifier"]}),
    ],
    ids=str,
)
def test_the_names_in_the_file_are_those_of_lora(ours: dict[str, object], theirs: dict[str, object]) -> None:
    targets = ["query", "value"]
    lora = get_peft_model(MODELS["bert"](), LoraConfig(target_modules=targets, **theirs))
    names = {name.partition(".lora_")[0] for name in get_peft_model_state_dict(lora)}
    model = adapted("bert", target_modules=targets, **ours)
    assert {name.partition(".dvora_")[0] for name in get_peft_model_state_dict(model)} == names


def test_saving_twice_gives_equal_files(tmp_path: Path) -> None:
    for folder, names in (("first", ["query", "value", "key"]), ("second", ["key", "value", "query"])):
        model = adapted(
            "bert", target_modules=names, exclude_modules=["1.attention.self.key", "0.attention.self.query"]
        )
        model.save_pretrained(tmp_path / folder)
    PeftModel.from_pretrained(MODELS["bert"](), tmp_path / "first").save_pretrained(tmp_path / "third")
    assert files(tmp_path / "first") == files(tmp_path / "second") == files(tmp_path / "third")


@pytest.mark.parametrize(
    ("name", "auto", "task_type"),
    [
        ("bert", AutoPeftModelForSequenceClassification, "SEQ_CLS"),
        ("llama", AutoPeftModelForCausalLM, "CAUSAL_LM"),
        ("llama", AutoPeftModel, None),
    ],
)
def test_auto_classes_load_base_and_adapter(name: str, auto: type, task_type: str | None, tmp_path: Path) -> None:
    base = MODELS[name]()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=LAYERS[name], task_type=task_type))
    train_vectors(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    options = {"num_labels": 3} if task_type == "SEQ_CLS" else {}
    loaded = auto.from_pretrained(tmp_path / "adapter", **options)
    assert type(loaded) is type(model)
    assert same_bits(outputs(loaded), outputs(model))


def test_biases_in_a_state_dict_at_hand_are_taken_as_by_peft() -> None:
    source = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"], bias="all")).eval()
    with torch.no_grad():
        source.base_model.model.lin1.bias.add_(1)
    target = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"])).eval()
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert same_bits(outputs(target), outputs(source))


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_bert(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "low_cpu_mem_usage"), [(torch.bfloat16, False), (torch.float64, False), (torch.float16, True)]
)
def test_vectors_saved_in_another_dtype_are_loaded_in_the_layers_own(
    folder: Path, dtype: torch.dtype, low_cpu_mem_usage: bool
) -> None:
    edit_weights(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    loaded = PeftModel.from_pretrained(MODELS["bert"](), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.dtype for name, p in loaded.named_parameters() if ".dvora_" in name} == {torch.float32}


def test_ignore_mismatched_sizes_leaves_the_vectors_of_another_shape_and_says_which(folder: Path) -> None:
    settings = {"r": 5, "projection_init": "kaiming_uniform"}
    model = get_peft_model(MODELS["bert"](), DVoRAConfig(target_modules=LAYERS["bert"], **settings))
    saved = load_file(folder / WEIGHTS)
    with pytest.warns(UserWarning, match=r"lambda_d\.default: found shape .*6.* in the checkpoint and .*5"):
        model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    for name, layer in dvora_layers(model):
        magnitude, lambda_b, lambda_d = layer.vectors("default")
        assert same_bits(magnitude, saved[f"base_model.model.{name}.dvora_magnitude"])
        assert same_bits(lambda_b, saved[f"base_model.model.{name}.dvora_lambda_b"])
        assert torch.equal(lambda_d, torch.full((5,), 0.1))


def test_vectors_stay_in_float32_and_a_wish_for_less_is_answered(folder: Path) -> None:
    PeftModel.from_pretrained(MODELS["bert"](), folder, autocast_adapter_dtype=False)
    with pytest.warns(UserWarning, match="autocast_adapter_dtype=False is ignored: the vectors stay in float32"):
        model = PeftModel.from_pretrained(MODELS["bert"]().bfloat16(), folder, autocast_adapter_dtype=False)
    assert {vector.dtype for _, layer in dvora_layers(model) for vector in layer.vectors("default")} == {torch.float32}


def test_large_values_that_give_finite_ones_are_loaded(folder: Path) -> None:
    key = f"{QUERY}.dvora_magnitude"
    edit_weights(folder, lambda tensors: tensors.update({key: 1e20 * tensors[key]}))
    model = PeftModel.from_pretrained(MODELS["bert"](), folder)
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({f"{QUERY}.dvora_magnitude": torch.full((48,), torch.nan)}), "not finite"),
        (lambda tensors: tensors.pop(f"{QUERY}.dvora_magnitude"), "lacks vectors"),
        (
            lambda tensors: tensors.update({"base_model.model.other.dvora_magnitude": torch.ones(48)}),
            "not adapted here",
        ),
    ],
)
def test_values_that_change_after_they_were_checked_are_checked_again(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    # What PEFT does, with somebody else's write between its two steps.
    config = DVoRAConfig.from_pretrained(str(folder))
    model = inject_adapter_in_model(config, MODELS["bert"]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_configuration_that_was_read_serves_for_a_new_adapter_of_another_rank(folder: Path) -> None:
    config = DVoRAConfig.from_pretrained(str(folder))
    config.r, config.inference_mode = 4, False
    model = get_peft_model(MODELS["bert"](), config)
    assert {len(p) for name, p in model.named_parameters() if "lambda_d" in name} == {4}
    assert not any(layer.vectors("default").lambda_b.any() for _, layer in dvora_layers(model))


# PEFT's model classes of the tasks: the head is trained, saved and loaded with the adapter.


TASKS: dict[str, tuple[type[nn.Module], str]] = {
    "SEQ_CLS": (BertForSequenceClassification, "classifier"),
    "TOKEN_CLS": (BertForTokenClassification, "classifier"),
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs"),
}


@torch.no_grad()
def task_outputs(model: nn.Module) -> Tensor:
    found = model(input_ids=torch.arange(12).view(2, 6))
    return torch.cat([value.flatten() for value in found.values()])


@pytest.mark.parametrize("further", [None, ["pooler", "key"]], ids=["head only", "further modules"])
@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_a_task_is_trained_saved_and_loaded(task: str, further: list[str] | None, tmp_path: Path) -> None:
    config = DVoRAConfig(r=4, target_modules=["query"], task_type=task, modules_to_save=further)
    model = get_peft_model(bert(TASKS[task][0], num_labels=2), config).eval()
    # PEFT adds it to the configuration.
    head = [name for name, p in model.named_parameters() if p.requires_grad and TASKS[task][1] in name]
    assert len(head) == 2
    train_vectors(model)
    with torch.no_grad():
        for name in head:
            model.get_parameter(name).add_(0.5)
    model.save_pretrained(tmp_path)
    assert set(model.peft_config["default"].modules_to_save) >= {TASKS[task][1], *(further or ())}
    assert same_bits(
        task_outputs(PeftModel.from_pretrained(bert(TASKS[task][0], num_labels=2), tmp_path)), task_outputs(model)
    )


def test_files_are_readable_as_new_files_are(tmp_path: Path) -> None:
    """safetensors writes them for their owner only."""
    folder = saved(KINDS["head"].trained(), tmp_path / "new")
    (tmp_path / "plain").touch()
    modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}, modes
