"""torch's transformer layers, which evaluate as one fused operation that reads weights instead of calling layers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.dense_weights import DenseModel
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import train_vectors


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def encoder() -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder().eval().requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def adapted(*names: str) -> PeftModel:
    model = get_peft_model(encoder(), DVoRAConfig(r=4, target_modules=list(names))).eval()
    train_vectors(model)
    return model


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize(
    "names",
    [("linear1",), ("linear2",), ("out_proj",), ("self_attn",), ("self_attn", "linear1", "linear2")],
    ids="+".join,
)
def test_no_evaluation_passes_an_adapter_by(names: tuple[str, ...], gradients: bool) -> None:
    model = adapted(*names)
    with torch.set_grad_enabled(gradients):
        found = model(inputs())
        assert worst_difference(found, DenseModel(encoder(), model)(inputs())) < 1e-5
        assert worst_difference(found, encoder()(inputs())) > 1e-3


def test_peft_lora_is_passed_by_there() -> None:
    """Why this is tested: LoRA on the same layer trains, and evaluates as if it were not there."""
    lora = get_peft_model(encoder(), LoraConfig(r=4, target_modules=["linear1"], init_lora_weights=False))
    assert worst_difference(lora.train()(inputs()), encoder()(inputs())) > 1e-3
    assert worst_difference(lora.eval()(inputs()), encoder()(inputs())) < 1e-5


@torch.no_grad()
def test_merged_disabled_and_unloaded_layers_are_fused_again() -> None:
    model = adapted("linear1")
    expected, base = model(inputs()), encoder()(inputs())
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base)
    model.merge_adapter()
    assert worst_difference(model(inputs()), expected) < 1e-5
    assert not model.base_model.model.encoder.layers[0].linear1.weight.is_meta
