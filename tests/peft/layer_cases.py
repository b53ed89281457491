"""A small model for every layer type that can be adapted, its inputs, and the settings that adapt it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import MixtralConfig
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.pytorch_utils import Conv1D

from dvora import DVoRAConfig


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    settings: dict[str, Any]

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, with the same values each time."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.model().eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        return model.to(dtype).requires_grad_(False)

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A batch of four; indices stay integers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            x = self.x()
        return x.to(dtype) if x.is_floating_point() else x

    def config(self, **settings: Any) -> DVoRAConfig:
        return DVoRAConfig(**{"r": 5, **self.settings, **settings})


class OneLayer(nn.Module):
    """A linear layer, the layer in question, and a head, so that gradients have a way to go."""

    def __init__(self, layer: nn.Module, width: int | None, head: int) -> None:
        super().__init__()
        self.before = nn.Identity() if width is None else nn.Linear(width, width)
        self.layer = layer
        self.head = nn.Linear(head, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.before(x))))


class Convolution(nn.Module):
    """A convolution over something, read out channel by channel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).flatten(2).mT)


class Attention(nn.Module):
    """Self-attention, or attention over keys and values of other widths."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True, **sizes)
        self.keys = nn.Linear(16, sizes.get("kdim", 16))
        self.values = nn.Linear(16, sizes.get("vdim", 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, self.keys(x), self.values(x), need_weights=False)[0]


class Fused(nn.Module):
    """torch's own transformer layer, which runs as one fused operation in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Experts(nn.Module):
    """A soft mixture whose experts are stacked, (experts, out, in) or (experts, in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = [(3, 16, 12), (3, 12, 8)] if is_transposed else [(3, 12, 16), (3, 8, 12)]
        self.up, self.down = (nn.Parameter(0.3 * torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        return (torch.tanh(x[:, None] @ up) @ down).sum(1)


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


class Mixtral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
        config._experts_implementation = "eager"
        self.moe = MixtralSparseMoeBlock(config)
        for parameter in self.moe.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


class Tied(nn.Module):
    """An embedding and a head with one weight, both adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.embed(ids)))


def _ids() -> Tensor:
    return torch.randint(0, 20, (4, 6))


def _convolution(layer_type: type[nn.Module], sizes: tuple[int, ...], **settings: Any) -> Case:
    channels = settings.pop("channels", (6, 8))
    kernel = settings.pop("kernel", 3)
    return Case(
        lambda: Convolution(layer_type(*channels, kernel, **settings)),
        lambda: torch.randn(4, channels[0], *sizes),
        {"target_modules": ["layer"]},
    )


_LAYER = {"target_modules": ["layer"]}

CASES: dict[str, Case] = {
    "Linear": Case(lambda: OneLayer(nn.Linear(10, 14), 10, 14), lambda: torch.randn(4, 6, 10), _LAYER),
    "Linear, weight_norm": Case(
        lambda: OneLayer(parametrizations.weight_norm(nn.Linear(10, 14)), 10, 14), lambda: torch.randn(4, 6, 10), _LAYER
    ),
    "transformers Conv1D": Case(lambda: OneLayer(Conv1D(14, 10), 10, 14), lambda: torch.randn(4, 6, 10), _LAYER),
    "Conv1d": _convolution(nn.Conv1d, (9,), padding="same", dilation=2),
    "Conv1d, groups, circular": _convolution(nn.Conv1d, (9,), groups=2, padding=1, padding_mode="circular", stride=2),
    "Conv2d": _convolution(nn.Conv2d, (7, 6), stride=(2, 1), padding=(1, 2)),
    "Conv2d, groups, reflect": _convolution(
        nn.Conv2d, (7, 6), groups=2, padding=1, padding_mode="reflect", dilation=(2, 1)
    ),
    "Conv2d, depthwise": _convolution(nn.Conv2d, (7, 6), groups=6, channels=(6, 12), kernel=2, bias=False),
    "Conv3d": _convolution(nn.Conv3d, (4, 5, 3), groups=2, padding="same"),
    "Embedding": Case(lambda: OneLayer(nn.Embedding(20, 8), None, 8), _ids, _LAYER),
    "Embedding, padding": Case(lambda: OneLayer(nn.Embedding(20, 8, padding_idx=3), None, 8), _ids, _LAYER),
    "Embedding, scaled": Case(
        lambda: OneLayer(BartScaledWordEmbedding(20, 8, padding_idx=1, embed_scale=2.5), None, 8), _ids, _LAYER
    ),
    "embedding and lm_head, tied": Case(Tied, _ids, {"target_modules": ["embed", "lm_head"]}),
    "MultiheadAttention": Case(Attention, lambda: torch.randn(4, 6, 16), {"target_modules": ["attn"]}),
    "MultiheadAttention, kdim and vdim": Case(
        lambda: Attention(kdim=10, vdim=12), lambda: torch.randn(4, 6, 16), {"target_modules": ["attn"]}
    ),
    "TransformerEncoderLayer": Case(
        Fused, lambda: torch.randn(4, 6, 16), {"target_modules": ["self_attn", "linear1", "linear2"]}
    ),
    "experts (E, out, in)": Case(
        lambda: Mixture(False), lambda: torch.randn(4, 6, 16), {"target_parameters": ["experts.up", "experts.down"]}
    ),
    "experts (E, in, out)": Case(
        lambda: Mixture(True), lambda: torch.randn(4, 6, 16), {"target_parameters": ["experts.up", "experts.down"]}
    ),
    "transformers Mixtral experts": Case(
        Mixtral,
        lambda: torch.randn(4, 6, 16),
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "Linear, magnitude only": Case(
        lambda: OneLayer(nn.Linear(10, 14), 10, 14),
        lambda: torch.randn(4, 6, 10),
        {"target_modules": ["before"], "magnitude_modules": ["layer"]},
    ),
}
READ = ("MultiheadAttention", "MultiheadAttention, kdim and vdim", "TransformerEncoderLayer")
"""Layers with weights that are read, beside the experts: one adapter serves the whole batch."""
