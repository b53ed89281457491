"""How many kernels a layer launches beyond its frozen base: on a GPU, and in small layers, they are its cost."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import dvora
from benchmarks.kernel_count import beyond_base, kernels

BLOCKS, TARGETS = 8, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = BLOCKS * len(TARGETS)

TRAINING = {("kaiming_uniform", torch.float32): 20, ("structured", torch.float32): 20}
ONE_TOKEN = {("kaiming_uniform", torch.float32): 5, ("structured", torch.float32): 5}
"""Upper limits."""


def model(config: PeftConfig | None, dtype: torch.dtype) -> nn.Module:
    """56 linear layers, adapted unless the configuration is None."""
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": BLOCKS}
    base = LlamaModel(LlamaConfig(vocab_size=8, use_cache=False, **sizes)).to(dtype).requires_grad_(False)
    return base if config is None else get_peft_model(base, config)


def training(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.train()
    x, trained = x.requires_grad_(), [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        # As an optimizer's step does: what was made from the old values may not be used again.
        torch.autograd.graph.increment_version(trained)
        model(inputs_embeds=x).last_hidden_state.sum().backward()

    return step


def one_token(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.eval()
    return torch.no_grad()(lambda: model(inputs_embeds=x[:, :1]))


def kernels_a_layer(config: PeftConfig, dtype: torch.dtype, step: Callable[..., Callable[[], object]]) -> float:
    counts = {}
    for name, of in (("base", None), ("adapted", config)):
        run = step(made := model(of, dtype), torch.randn(1, 8, 64, dtype=dtype))
        # The first pass tells which layers there are, the second makes what later ones find.
        run(), run()
        made.zero_grad()
        counts[name] = kernels(run).total()
    return beyond_base(counts, "base", LAYERS)["adapted"]


def dvora_of(matrices: str) -> PeftConfig:
    return dvora.DVoRAConfig(r=16, target_modules=TARGETS, projection_init=matrices)


@pytest.mark.parametrize(("matrices", "dtype"), TRAINING, ids=str)
def test_training_launches_no_more_than_the_limit(matrices: str, dtype: torch.dtype) -> None:
    assert kernels_a_layer(dvora_of(matrices), dtype, training) <= TRAINING[matrices, dtype]


@pytest.mark.parametrize(("matrices", "dtype"), ONE_TOKEN, ids=str)
def test_a_token_launches_no_more_than_the_limit(matrices: str, dtype: torch.dtype) -> None:
    assert kernels_a_layer(dvora_of(matrices), dtype, one_token) <= ONE_TOKEN[matrices, dtype]


def test_the_counts_of_other_methods_are_those_of_their_formulas() -> None:
    lora, vera = LoraConfig(r=16, target_modules=TARGETS), VeraConfig(r=16, target_modules=TARGETS)
    # Two products, a strength and a sum; VeRA multiplies by two vectors in place of the strength, and adds.
    assert kernels_a_layer(lora, torch.float32, one_token) == 4
    assert kernels_a_layer(vera, torch.float32, one_token) == 5
    assert kernels_a_layer(lora, torch.float32, training) == 10
    assert kernels_a_layer(vera, torch.float32, training) == 14
