"""HyperAdapt as the benchmarks have it: the formula of its paper, and LoRA r=1's number of values."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.hyperadapt import ScaledLinear, scaled


def test_a_layer_is_the_formula() -> None:
    torch.manual_seed(0)
    layer, x = ScaledLinear(nn.Linear(6, 4)), torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.rows.normal_()
        layer.columns.normal_()
        weight = layer.rows.diag() @ layer.base.weight @ layer.columns.diag()
        torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias)


def test_every_layer_is_scaled_with_as_many_values_as_lora_of_rank_one() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.ModuleDict({"inner": nn.Linear(4, 5)})).requires_grad_(False)

    def trained(model: nn.Module) -> int:
        return sum(each.numel() for each in model.parameters() if each.requires_grad)

    lora = get_peft_model(model(), LoraConfig(r=1, target_modules=["0", "inner"]))
    assert trained(scaled(model())) == trained(lora)
    assert trained(scaled(model(), ["inner"])) == 9
