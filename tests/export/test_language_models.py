"""Language models of other architectures than Llama, by the shapes of their caches."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from dvora.recipes.adapters.exporting import export
from tests.recipes import tiny_models
from tests.serve.served import save_trained

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


@pytest.mark.parametrize(("make", "method"), [(gpt2, "dvora"), (gpt2, "lora"), (gemma3, "dvora")])
def test_a_step_of_the_graph_is_one_of_the_model(tmp_path: Path, make: type, method: str) -> None:
    base = tiny_models.llama(tmp_path / "base")
    words = len(tiny_models.SPECIAL) + 99
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make(words).save_pretrained(base)
    targets = ["c_attn" if make is gpt2 else "q_proj"]
    save_trained(base, tmp_path / "adapter", 1, task_type="CAUSAL_LM", target_modules=targets, method=method)
    differences = export(tmp_path / "adapter", tmp_path / "exported", "onnx", str(base), int8=True)["differences"]
    # Of logits up to fifty.
    assert differences.pop("one-int8.onnx") > 1e-3
    assert set(differences) == {"one.onnx", "table.onnx", "files.onnx"}
    assert max(differences.values()) < 1e-4
