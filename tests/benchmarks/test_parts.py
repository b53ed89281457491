"""The parts of the method as the benchmarks have them: the formula, and HyperAdapt's number of values."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.parts import PartsLinear, with_parts
from dvora import SharedProjections


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_a_layer_is_the_formula(rows: bool, columns: bool, rank: int) -> None:
    torch.manual_seed(0)
    shared = SharedProjections(0)
    layer, x = PartsLinear(nn.Linear(6, 4), rows, columns, rank, shared), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), layer.base(x))
    with torch.no_grad():
        weight = layer.base.weight.clone()
        for name, trained in layer.named_parameters(recurse=False):
            trained.normal_()
            if name == "columns":
                weight = weight @ trained.diag()
        if rank:
            update = shared.B(rank, 4) @ layer.lambda_d.diag() @ shared.A(rank, 6)
            weight = weight + (layer.base.weight.norm(dim=1) * layer.lambda_b).diag() @ update
        if layer.rows is not None:
            weight = layer.rows.diag() @ weight
        torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias)


def test_rows_and_columns_are_as_many_values_as_lora_of_rank_one() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.ModuleDict({"inner": nn.Linear(4, 5)})).requires_grad_(False)

    def trained(model: nn.Module) -> int:
        return sum(each.numel() for each in model.parameters() if each.requires_grad)

    lora = get_peft_model(model(), LoraConfig(r=1, target_modules=["0", "inner"]))
    assert trained(with_parts(model(), rows=True, columns=True)) == trained(lora)
    assert trained(with_parts(model(), rows=True, columns=True, targets=["inner"])) == 9
