"""The counts are those of PEFT's own models, value by value and byte by byte, and cost no memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import VeraConfig
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from dvora.recipes.adapters.counting import RANKS, count
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import adapted, trained_parameters

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")


def gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


MODELS: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "bert": (tiny_models.bert, None),
    "bert with a head": (tiny_models.bert, "SEQ_CLS"),
    "llama": (tiny_models.llama, "CAUSAL_LM"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "vit": (tiny_models.vit, None),
}
TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "dense"),
    "bert with a head": ("value", "intermediate.dense"),
    "llama": ("q_proj", "down_proj", "embed_tokens"),
    "gpt2": ("c_attn",),
    "vit": ("q_proj", "fc1"),
}


@pytest.mark.parametrize("targets", ["all", "some"])
@pytest.mark.parametrize("name", MODELS)
def test_they_agree_with_what_peft_trains_and_saves(name: str, targets: str, tmp_path: Path) -> None:
    make, task_type = MODELS[name]
    base = make(tmp_path / "base")
    names = TARGETS[name] if targets == "some" else ()
    found = count(str(base), names, [3], task_type, labels=3 if task_type == "SEQ_CLS" else None)
    by_method = {row["method"]: row for row in found["counts"]}
    assert [row["method"] for row in found["counts"]] == list(RANKS)
    for method in ("dvora", "vera", "lora", "dora"):
        row = by_method[method]
        if method == "vera" and "embed_tokens" in names:
            assert (row["trained"], "Embedding(103, 16) is not supported" in row["note"]) == (None, True)
            continue
        options = {"target_modules": list(names)} if names else {}
        model = adapted(base, method, rank=3, task_type=task_type, **options)
        model.save_pretrained(tmp_path / method, save_embedding_layers=False)
        assert row["trained"] == trained_parameters(model), method
        assert row["file_bytes"] == (tmp_path / method / "adapter_model.safetensors").stat().st_size, method
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
        assert row["optimizer_bytes"] == sum(value.nbytes for value in state)


def test_the_smallest_adapters_are_compared_unless_ranks_are_named(tmp_path: Path) -> None:
    base = str(tiny_models.bert(tmp_path / "base"))
    shown = {(row["method"], row["rank"]) for row in count(base)["counts"]}
    assert shown >= {("lora", 1), ("dvora", 64), ("lora", 8), ("dvora", 256), ("full", None)}
    assert {row["rank"] for row in count(base, ranks=[5, 7])["counts"]} == {5, 7, None}


def test_full_and_head_are_the_models_own(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=5)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    rows = {row["method"]: row for row in count(str(tmp_path))["counts"]}
    assert rows["full"]["trained"] == sum(p.numel() for p in model.parameters())
    assert rows["full"]["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert rows["head"]["trained"] == sum(p.numel() for p in model.classifier.parameters()) == 5 * 17


def test_convolutions_count_too(tmp_path: Path) -> None:
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    rows = {row["method"]: row for row in count(str(tmp_path), ["convolution"], [2])["counts"]}
    convolutions = [m for n, m in model.named_modules() if n.endswith("convolution")]
    head = sum(p.numel() for p in model.classifier.parameters())
    assert rows["dvora"]["trained"] == head + sum(2 * m.out_channels + 2 for m in convolutions)
    assert rows["lora"]["trained"] == head + sum(2 * m.weight[0].numel() + 2 * m.out_channels for m in convolutions)
    assert "No layers types compatible with VeRA" in rows["vera"]["note"]


def test_nothing_but_the_configuration_is_needed(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", hidden_size=8192, num_hidden_layers=3, vocab_size=128_000).save_pretrained(tmp_path)
    found = count(str(tmp_path), ranks=[1024], task_type="CAUSAL_LM")
    assert found["parameters"] > 2_500_000_000
    assert found["counts"][0]["trained"] is not None


def test_without_its_matrices_the_file_of_vera_is_as_the_note_says(tmp_path: Path) -> None:
    base = tiny_models.bert(tmp_path / "base")
    note = next(row["note"] for row in count(str(base), ranks=[3])["counts"] if row["method"] == "vera")
    model = adapted(base, "vera", rank=3, save_projection=False)
    assert isinstance(model.peft_config["default"], VeraConfig)
    model.save_pretrained(tmp_path / "vera")
    assert f"{(tmp_path / 'vera' / 'adapter_model.safetensors').stat().st_size:,} bytes" in note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": [0]}, "ranks must be positive, got 0"),
        ({"task_type": "NONE"}, "unknown task type 'NONE', expected one of SEQ_CLS"),
        ({"targets": ["nothing"]}, "nothing"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    base = tiny_models.bert(tmp_path)
    with pytest.raises(ValueError, match=message):
        count(str(base), **arguments)
