"""How many kernels a layer launches beyond its frozen base: on a GPU, and in small layers, they are its cost."""

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import dvora
from benchmarks.kernel_count import kernels

BLOCKS, TARGETS = 8, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = BLOCKS * len(TARGETS)
MOST = {"training": 52, "a token": 5}


def model(config: PeftConfig | None) -> nn.Module:
    """56 linear layers, adapted unless the configuration is None."""
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": BLOCKS}
    base = LlamaModel(LlamaConfig(vocab_size=8, use_cache=False, **sizes)).requires_grad_(False)
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


def kernels_a_layer(config: PeftConfig, step: Callable[..., Callable[[], object]]) -> float:
    counts = []
    for of in (config, None):
        run = step(made := model(of), torch.randn(1, 8, 64))
        # What is made once is made now.
        run(), run()
        made.zero_grad()
        counts.append(kernels(run).total())
    return (counts[0] - counts[1]) / LAYERS


def test_a_layer_launches_no_more_kernels_than_the_limit() -> None:
    config = dvora.DVoRAConfig(r=16, target_modules=TARGETS)
    assert kernels_a_layer(config, training) <= MOST["training"]
    assert kernels_a_layer(config, one_token) <= MOST["a token"]


def test_a_magnitude_alone_launches_fewer() -> None:
    config = dvora.DVoRAConfig(r=16, target_modules=TARGETS, magnitude_modules=TARGETS)
    assert kernels_a_layer(config, training) <= 33
    assert kernels_a_layer(config, one_token) <= 1


def test_the_count_of_lora_is_that_of_its_formula() -> None:
    # Two products, a strength and a sum.
    assert kernels_a_layer(LoraConfig(r=16, target_modules=TARGETS), one_token) == 4
