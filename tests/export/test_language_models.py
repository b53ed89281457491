"""Language models of other architectures than Llama, by the shapes of their caches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from dvora.export.packed import graph_file, read_layout
from dvora.recipes.adapters.exporting import export
from tests.peft.kinds import GROUPS
from tests.recipes import tiny_models
from tests.serve.served import save_trained

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


def gpt2(words: int) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=words,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
    )
    return GPT2LMHeadModel(config)


def gemma3(words: int) -> PreTrainedModel:
    # The sample's texts are longer than the window.
    config = Gemma3TextConfig(vocab_size=words, sliding_window=8, layer_types=["sliding_attention"], **SIZES)
    return Gemma3ForCausalLM(config)


def base_of(make: Callable[[int], PreTrainedModel], folder: Path) -> Path:
    base = tiny_models.llama(folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make(len(tiny_models.SPECIAL) + 99).save_pretrained(base)
    return base


@pytest.mark.parametrize(
    "settings", [{"method": "dvora"}, {"method": "dvora", "lambda_d_groups": GROUPS}, {"method": "lora"}], ids=str
)
def test_a_step_of_the_graph_is_one_of_the_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of a model whose weights are stored transposed."""
    base = base_of(gpt2, tmp_path)
    save_trained(base, tmp_path / "adapter", 1, task_type="CAUSAL_LM", target_modules=["c_attn"], **settings)
    differences = export(tmp_path / "adapter", tmp_path / "exported", "onnx", str(base))["differences"]
    assert set(differences) == {"one.onnx", "table.onnx", "files.onnx"}


def test_each_method_has_layers_of_its_own(tmp_path: Path) -> None:
    """Of a model with a window, in its graphs and in what int8 weights are of."""
    base = base_of(gemma3, tmp_path)
    for method, targets in (("dvora", ["q_proj"]), ("lora", ["v_proj", "o_proj"])):
        save_trained(
            base, tmp_path / "adapters" / method, 1, task_type="CAUSAL_LM", target_modules=targets, method=method
        )
    export(tmp_path / "adapters", tmp_path / "exported", "onnx", str(base), int8=True)
    layout = read_layout(tmp_path / "exported")
    names = [entry["name"].rpartition("self_attn.")[2] for entry in layout["entries"]]
    assert names == [
        *(f"q_proj.{part}" for part in ("gain_minus_one", "scale", "lambda_d")),
        *(f"{layer}.lora_{part}.T" for layer in ("o_proj", "v_proj") for part in "AB"),
    ]
    graph = onnx.load(graph_file(tmp_path / "exported", layout, "one-int8")).graph
    kinds = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2]
    assert kinds.count(onnx.TensorProto.UINT8) == 3
