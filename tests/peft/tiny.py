"""Tiny models of every architecture that the tests adapt, their inputs, and vectors as if they had been trained."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dvora.peft import DVoRALayer

VOCABULARY = 40


class MLP(nn.Module):
    """Three linear layers, the last without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 24)
        self.lin1 = nn.Linear(24, 24)
        self.lin2 = nn.Linear(24, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


def mlp() -> MLP:
    return _seeded(MLP)


def bert(head: type[nn.Module] = BertForSequenceClassification, num_labels: int = 3) -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        num_labels=num_labels,
        initializer_range=0.2,
    )
    return _seeded(lambda: head(config))


def llama(key_value_heads: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return _seeded(lambda: T5ForConditionalGeneration(config))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "bert": bert, "llama": llama, "gpt2": gpt2, "t5": t5}

LAYERS: dict[str, list[str]] = {
    "mlp": ["lin0", "lin1", "lin2"],
    "bert": ["query", "value", "dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wo"],
}
"""Targets of each, with layers of different sizes."""


def inputs(model: nn.Module, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        floating = next(p.dtype for p in model.parameters())
        return {"x": torch.randn(rows, 10, generator=generator).to(floating)}
    batch = {
        "input_ids": torch.randint(3, VOCABULARY, (rows, 7), generator=generator),
        "attention_mask": torch.ones(rows, 7, dtype=torch.int64),
    }
    if model_type == "t5":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    return batch


def forward(model: nn.Module, rows: int = 4, **options: object) -> Tensor:
    result = model(**inputs(model, rows), **options)
    return result if isinstance(result, Tensor) else result.logits


@torch.no_grad()
def outputs(model: nn.Module, rows: int = 4, **options: object) -> Tensor:
    """`forward` without gradients: attention takes other kernels, and other roundings, where some are needed."""
    return forward(model, rows, **options)


def loss(model: nn.Module, rows: int = 4) -> Tensor:
    result = forward(model, rows)
    return (result * torch.linspace(-1, 2, result.numel()).to(result.dtype).view_as(result)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of `loss` of everything trainable, by name."""
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dvora_layers(model: nn.Module) -> Iterator[tuple[str, DVoRALayer]]:
    """The adapted layers by the names that they have in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, DVoRALayer):
            yield name.removeprefix("base_model.model."), module


@torch.no_grad()
def train_vectors(model: nn.Module, adapter_name: str = "default", seed: int = 0) -> None:
    """Vectors that turn the rows by tens of degrees and change their norms by tens of percent."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in dvora_layers(model):
        if adapter_name in layer.dvora_adapted:
            magnitude, lambda_b, lambda_d = layer.vectors(adapter_name)
            magnitude.mul_(1 + 0.2 * torch.randn(len(magnitude), generator=generator))
            lambda_b.copy_(torch.randn(len(lambda_b), generator=generator))
            lambda_d.add_(0.1 * torch.randn(lambda_d.shape, generator=generator))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, in dtype and shape too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if type(a) not in (Tensor, nn.Parameter):
        a, b = a.dequantize(), b.dequantize()
    return torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


@torch.no_grad()
def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The same values each time; transformers starts with biases of zero, which would hide what happens to them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
