"""The counts are those of PEFT's own models, and cost no memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

from dvora.recipes.adapters.counting import count
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
def test_they_agree_with_what_peft_trains(name: str, targets: str, tmp_path: Path) -> None:
    make, task_type = MODELS[name]
    base = make(tmp_path / "base")
    if task_type == "SEQ_CLS":
        AutoConfig.from_pretrained(base, num_labels=3).save_pretrained(base)
    names = TARGETS[name] if targets == "some" else ()
    found = count(str(base), names, [3], task_type)
    options = {"target_modules": list(names)} if names else {}
    with_head = adapted(base, "lora", rank=3, task_type=task_type, **options).get_base_model()
    head = [] if task_type != "SEQ_CLS" else [*with_head.classifier.modules_to_save["default"].parameters()]
    values = {name for name, _ in with_head.named_parameters() if "lora_" not in name and "original_module" not in name}
    assert (
        found["parameters"]
        == found["counts"][-1]["trained"]
        == sum(parameter.numel() for name, parameter in with_head.named_parameters() if name in values)
    )
    assert found["head"] == sum(parameter.numel() for parameter in head)
    by_groups = count(str(base), names, [3], task_type, groups=5)["counts"]
    model = adapted(base, "dvora", rank=3, task_type=task_type, lambda_d_groups=5, **options)
    assert by_groups[0]["trained"] == trained_parameters(model)
    assert by_groups[1:] == found["counts"][1:]
    for row in found["counts"][:2]:
        model = adapted(base, row["method"], rank=3, task_type=task_type, **options)
        assert row["trained"] == trained_parameters(model), row["method"]
        assert row["bytes"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_the_smallest_adapters_are_compared_unless_ranks_are_named(tmp_path: Path) -> None:
    base = str(tiny_models.bert(tmp_path / "base"))
    shown = {(row["method"], row["rank"]) for row in count(base)["counts"]}
    assert shown >= {("lora", 1), ("dvora", 64), ("lora", 8), ("dvora", 256), ("full", None)}
    assert {row["rank"] for row in count(base, ranks=[5, 7])["counts"]} == {5, 7, None}


def test_convolutions_count_too(tmp_path: Path) -> None:
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    rows = {row["method"]: row for row in count(str(tmp_path), ["convolution"], [2])["counts"]}
    convolutions = [m for n, m in model.named_modules() if n.endswith("convolution")]
    head = sum(p.numel() for p in model.classifier.parameters())
    assert rows["dvora"]["trained"] == head + sum(2 * m.out_channels + 2 for m in convolutions)
    assert rows["lora"]["trained"] == head + sum(2 * m.weight[0].numel() + 2 * m.out_channels for m in convolutions)


def test_nothing_but_the_configuration_is_needed(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", hidden_size=8192, num_hidden_layers=3, vocab_size=128_000).save_pretrained(tmp_path)
    assert count(str(tmp_path), ranks=[1024], task_type="CAUSAL_LM")["parameters"] > 2_500_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "lambda_d_groups must be at least 1, got 0"),
        ({"groups": 17}, r"encoder\.layer\.0\.attention\.self\.query: lambda_d_groups=17 cuts .* it has 16"),
        ({"ranks": [0]}, "ranks must be positive, got 0"),
        ({"task_type": "NONE"}, "unknown task type 'NONE', expected one of SEQ_CLS"),
        ({"targets": ["nothing"]}, "nothing"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    base = tiny_models.bert(tmp_path)
    with pytest.raises(ValueError, match=message):
        count(str(base), **arguments)
