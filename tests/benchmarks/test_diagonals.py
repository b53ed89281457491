"""The prototype of diagonals: its outputs and gradients are those of the dense formula, and it starts as the base."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.quality.diagonals import DiagonalLinear, with_diagonals

SIZES = ((8, 8), (12, 5), (5, 12), (6, 20), (8, 12), (7, 4))


def changed(outputs: int, inputs: int, **options: bool) -> DiagonalLinear:
    """A layer of float64 that is not the base any more."""
    base = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
    layer = DiagonalLinear(base, 3, seed=1, lambda_b=True, **options).double()
    with torch.no_grad():
        for trained in (layer.dvora_magnitude, layer.lambda_b, layer.lambda_d):
            trained.add_(0.3 * torch.randn_like(trained))
    return layer


def dense(layer: DiagonalLinear, x: Tensor) -> Tensor:
    """x W'^T + bias, with the weight written entry by entry."""
    updated = layer.base.weight.clone()
    for diagonal, columns in enumerate(layer.columns.tolist()):
        for row, column in enumerate(columns):
            updated[row, column] = updated[row, column] + layer.lambda_b[row] * layer.lambda_d[diagonal, row]
    weight = (layer.dvora_magnitude / updated.norm(dim=1))[:, None] * updated
    return x @ weight.T + layer.base.bias


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"near": True}, {"scramble": True}])
def test_a_layer_is_the_dense_formula_and_so_are_its_gradients(size: tuple[int, int], options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    layer = changed(*size, **options)
    x = torch.randn(2, 9, size[1], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 9, size[0], dtype=torch.float64)
    inputs = [x, layer.dvora_magnitude, layer.lambda_b, layer.lambda_d]
    torch.testing.assert_close(layer(x), dense(layer, x))
    pairs = [
        torch.autograd.grad((function(x) * weights).sum(), inputs) for function in (layer, lambda x: dense(layer, x))
    ]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scramble", [False, True])
def test_diagonals_do_not_meet_and_reach_every_column(size: tuple[int, int], scramble: bool) -> None:
    layer = DiagonalLinear(nn.Linear(*reversed(size)), 3, seed=2, scramble=scramble)
    assert len(set(layer.index.tolist())) == layer.index.numel()
    assert set(layer.columns.flatten().tolist()) == set(range(size[1]))


def test_models_start_as_they_were_and_layers_of_a_size_have_the_same_shifts() -> None:
    config = BertConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=9)
    model = BertModel(config, add_pooling_layer=False).requires_grad_(False).eval()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).last_hidden_state
    adapted = with_diagonals(model, count=2, seed=0)
    torch.testing.assert_close(adapted(input_ids=ids).last_hidden_state, before)
    first, second = (each.attention.self.query for each in adapted.encoder.layer)
    assert first.shifts == second.shifts
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    assert trained == 2 * (5 * 12 + 24 + 2 * (4 * 12 + 24 + 24))
