"""The frozen models that are adapted and timed, and what goes into them.

Inputs are embeddings, so that the first layer has to compute the gradient of its input like all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaModel

from materials import models

SEED = 0
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LAYERS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""For BERT; it would draw from torch's global generator."""


@dataclass(frozen=True)
class Workload:
    """A model to adapt.

    Args:
        name: in the result file.
        hidden: size of its inputs.
        targets: names of the adapted layers.
        build: makes the model with random or real weights.
        output: its output for embedded inputs.
    """

    name: str
    hidden: int
    targets: tuple[str, ...]
    build: Callable[[], nn.Module]
    output: Callable[[nn.Module, Tensor], Tensor]

    def frozen(self, dtype: torch.dtype) -> nn.Module:
        """The frozen base model."""
        return self.build().to(dtype).requires_grad_(False)

    def inputs(self, batch: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """Random embeddings, (batch, tokens, hidden)."""
        return random(batch, tokens, self.hidden, dtype=dtype)


class Linears(nn.Module):
    """The seven linear layers of a Llama block and nothing else but the sums that join them.

    Args:
        hidden, intermediate: sizes.
        key_value: outputs of key and value, a divisor of `hidden`.
    """

    def __init__(self, hidden: int, intermediate: int, key_value: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden, key_value, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.repeats = hidden // key_value

    def forward(self, x: Tensor) -> Tensor:
        # Sums, because a product would keep both of its factors for the backward pass.
        grouped = self.k_proj(x) + self.v_proj(x)
        x = self.o_proj(
            self.q_proj(x) + (grouped if self.repeats == 1 else grouped.repeat_interleave(self.repeats, -1))
        )
        y: Tensor = self.down_proj(self.gate_proj(x) + self.up_proj(x))
        return y


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
    """Standard normal values of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linears(hidden: int, intermediate: int, key_value: int | None = None, blocks: int = 1) -> Workload:
    """Blocks of seven linear layers: query, key and value read the same input, gate and up another one."""

    def build() -> nn.Module:
        return randomised(nn.Sequential(*(Linears(hidden, intermediate, key_value or hidden) for _ in range(blocks))))

    return Workload(_named("linears", hidden, blocks), hidden, LLAMA_LAYERS, build, lambda model, x: model(x))


def llama(hidden: int, intermediate: int, heads: int, blocks: int = 1) -> Workload:
    """A Llama-shaped stack of transformers with random weights."""

    def build() -> nn.Module:
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_hidden_layers=blocks,
            max_position_embeddings=8192,
            # A cache would keep keys and values.
            use_cache=False,
        )
        return randomised(LlamaModel(config))

    return Workload(_named("llama", hidden, blocks), hidden, LLAMA_LAYERS, build, last_hidden_state)


def bert(hidden: int, blocks: int) -> Workload:
    """A BERT without dropout: query, key and value read the same input."""

    def build() -> nn.Module:
        torch.manual_seed(SEED)
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 32}
        config = BertConfig(vocab_size=8, num_hidden_layers=blocks, **sizes, **NO_DROPOUT)
        return BertModel(config, add_pooling_layer=False)

    return Workload(_named("bert", hidden, blocks), hidden, BERT_LAYERS, build, last_hidden_state)


def minilm() -> Workload:
    """all-MiniLM-L6-v2, whole."""

    def build() -> nn.Module:
        model: nn.Module = AutoModel.from_pretrained(models.minilm(), **NO_DROPOUT)
        return model

    return Workload("minilm", 384, BERT_LAYERS, build, last_hidden_state)


def smollm2() -> Workload:
    """SmolLM2-135M, whole, with its head."""

    def output(model: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = model(inputs_embeds=x, use_cache=False).logits
        return logits

    def build() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(models.smollm2())
        return model

    return Workload("smollm2", 576, LLAMA_LAYERS, build, output)


def _named(kind: str, hidden: int, blocks: int) -> str:
    return f"{kind}-{hidden}" + (f"-{blocks}-blocks" if blocks > 1 else "")


def last_hidden_state(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a transformers model without a head."""
    hidden: Tensor = model(inputs_embeds=x).last_hidden_state
    return hidden


def randomised(model: nn.Module) -> nn.Module:
    """The model with matrices drawn from a seed, of standard deviation one over the root of the input's size."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                parameter.copy_(random(*parameter.shape, seed=number) / parameter.shape[1] ** 0.5)
    return model
