"""The models of the golden files: adapters as the library of commit 24ccd64 saved them, with what they answered.

The library may be rebuilt; a file that a user has must go on meaning the same. `test_golden_files.py` holds that. So
these files were made once, by this file as it was then, whose name is in some of them, and are not to be made again
because a test fails. The pack is in the format that came after ("dvora pack 2"). `groups` came with groups of lambda_d,
which that commit did not have. Where settings named the structured matrices, which the library had once, they name
uniform ones now: the values are that commit's, byte for byte, and answers and digests were made again. Two
settings that are no longer known were taken out of all files.

A folder of a case holds what `save_pretrained` wrote and `answers.safetensors`: the inputs and the outputs, float32.
`flat/` holds one adapter as a vector with its layout, `packs/` three adapters in one file.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

GOLDEN = Path(__file__).parent
ANSWERS = "answers.safetensors"
VOCABULARY, HIDDEN = 40, 32
TENANTS = ("ann", "bob", "eve")


class MLP(nn.Module):
    """Three linear layers, the last without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.lin2 = nn.Linear(10, 24), nn.Linear(24, 24), nn.Linear(24, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


class Experts(nn.Module):
    """Two matrices for each of three experts, as stacks; the experts are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(3, 12, 8)), nn.Parameter(torch.empty(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ self.up.mT) @ self.down.mT).mean(0)


class Mixture(nn.Module):
    """A block with experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


def bert() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=16,
        ),
        add_pooling_layer=False,
    )


def gpt2() -> nn.Module:
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return GPT2Model(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


@dataclass(frozen=True)
class Case:
    """An adapter: its base, and the settings of its configuration."""

    make: Callable[[], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def base(self) -> nn.Module:
        """The frozen model, whose values are drawn here, so that no other library's way to start matters."""
        model, generator = self.make().eval().requires_grad_(False), torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                # Biases are about zero, the weights of norms about one.
                parameter.copy_(name.endswith("weight") + 0.1 * noise)
        return model

    def inputs(self, rows: int = 3) -> Tensor:
        """Tokens for the transformers models, else numbers."""
        generator = torch.Generator().manual_seed(2)
        if self.make in (bert, gpt2):
            return torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
        return torch.randn(rows, 8 if self.make is Mixture else 10, generator=generator)


BERT_LAYERS, MLP_LAYERS = ["query", "key", "value", "dense"], ["lin0", "lin1", "lin2"]
CASES = {
    "plain": Case(bert, {"r": 16, "target_modules": BERT_LAYERS}),
    "kaiming_uniform": Case(
        bert,
        {
            "r": 8,
            "target_modules": BERT_LAYERS,
            "projection_seed": 7,
            "rank_pattern": {"query": 4},
            "alpha": 12.0,
            "alpha_pattern": {"value": 2.0},
        },
    ),
    "direction_weight": Case(MLP, {"r": 4, "target_modules": MLP_LAYERS, "direction": "weight"}),
    "rank_above_width": Case(MLP, {"r": 40, "target_modules": MLP_LAYERS}),
    "magnitude_modules": Case(MLP, {"r": 4, "target_modules": ["lin1"], "magnitude_modules": ["lin0", "lin2"]}),
    "strength": Case(MLP, {"r": 4, "target_modules": MLP_LAYERS, "strength": 0.5}),
    "conv1d_and_embedding": Case(gpt2, {"r": 8, "target_modules": ["c_attn", "c_proj", "wte"]}),
    "expert_stacks": Case(Mixture, {"r": 4, "target_parameters": ["experts.up", "experts.down"]}),
    "peft_vera": Case(MLP, {"r": 4, "target_modules": ["lin1"], "projection_init": "peft_vera(r=4, in=24, out=24)"}),
    # Of the widths, 3 divides 48 and not 32.
    "groups": Case(bert, {"r": 8, "target_modules": BERT_LAYERS, "lambda_d_groups": 3, "rank_pattern": {"query": 4}}),
    "saved_whole": Case(
        bert,
        {
            "r": 4,
            "target_modules": ["query"],
            "bias": "dvora_only",
            "modules_to_save": ["1.output.LayerNorm"],
            "trainable_token_indices": [3, 5],
        },
    ),
}
FLAT = "saved_whole"
"""The case that is kept as a flat vector too."""
PACKED = Case(bert, {"r": 4, "target_modules": ["query", "value"]})


def trained(case: Case, seed: int = 0) -> PeftModel:
    """The base with an adapter whose values are far from those that it starts with."""
    from dvora import DVoRAConfig

    model, generator = get_peft_model(case.base(), DVoRAConfig(**case.settings)).eval(), torch.Generator()
    generator.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                # Magnitudes are changed by tens of percent; rows turn by tens of degrees.
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * parameter * noise.flip(0) + 0.3 * noise)
    return model


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Of any of the models, the last hidden state."""
    y = model(x)
    return y if isinstance(y, Tensor) else y.last_hidden_state
