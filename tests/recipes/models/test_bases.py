"""Bases: loaded or refused in one line; and computing as a run did, on a device that is there."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, RobertaConfig

from dvora.recipes.models.bases import computing, device_of, load_base, longest_text
from tests.recipes.finished_runs import settings_of


def test_new_layers_come_from_the_seed_alone(models: dict[str, Path]) -> None:
    chosen = settings_of("text-classification", models["bert"], seed=3)
    first, second = (load_base(chosen, ["bad", "good"], 0) for _ in range(2))
    assert (first.heads, first.new, first.notes) == (("classifier",), {"classifier"}, ("new layers: classifier",))
    assert first.model.config.id2label == {0: "bad", 1: "good"}
    assert (first.model.classifier.weight == second.model.classifier.weight).all()
    other = load_base(chosen.model_copy(update={"seed": 4}), ["bad", "good"], 0)
    assert (first.model.classifier.weight != other.model.classifier.weight).any()


def test_what_the_base_lacks_is_trained_whole_too(bert: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(tmp_path)
    base = load_base(settings_of("regression", tmp_path), [], 0)
    assert base.heads == ("classifier", "bert.pooler.dense")


def test_a_pipe_in_a_model_s_folder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        load_base(settings_of("regression", tmp_path), [], 0)


MODEL = {"config.json": {"model_type": "bert"}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"adapter_config.json": {}}, "an adapter, not a model; name its base"),
        ({**MODEL, "adapter_config.json": {}}, "an adapter beside the model"),
        ({**MODEL, "pytorch_model.bin": {}}, "pickled ones .* are never loaded"),
        ({"config.json": {"model_type": "no"}, "model.safetensors": {}}, "cannot be read"),
        (None, "'nobody/nothing' is no folder here"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, files: dict[str, object] | None, message: str) -> None:
    for name, content in (files or {}).items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_base(settings_of("regression", "nobody/nothing" if files is None else tmp_path), [], 0)
    assert "\n" not in str(error.value)


# A run in float16 comes from a GPU; a CPU goes on in the precision of the weights.
@pytest.mark.parametrize(
    ("mixed_precision", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float32)]
)
def test_precision_and_no_gradients(mixed_precision: str, expected: torch.dtype) -> None:
    layer = torch.nn.Linear(3, 2)
    with computing(settings_of("regression", mixed_precision=mixed_precision)):
        output = layer(torch.ones(1, 3))
    assert output.dtype == expected
    assert not output.requires_grad
    assert layer(torch.ones(1, 3)).requires_grad


def test_a_run_that_keeps_to_the_cpu_computes_there() -> None:
    assert device_of(settings_of("regression")).type == "cpu"
    torch.ones(1, device=device_of(settings_of("regression", cpu=False)))


@pytest.mark.parametrize(("kind", "longest"), [(BertConfig, 12), (RobertaConfig, 10)])
def test_the_longest_text_is_what_a_model_has_positions_for(bert: Path, kind: type, longest: int) -> None:
    """Some begin to count them behind the padding's."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = kind(**sizes, vocab_size=19, max_position_embeddings=12, pad_token_id=1)
    model = AutoModel.from_config(config)
    assert longest_text(AutoTokenizer.from_pretrained(bert), config) == longest
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))
