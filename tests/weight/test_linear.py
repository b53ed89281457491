"""Which way a linear layer takes, and that every way gives the same outputs and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dvora import SharedProjections
from dvora.weight import updated_linear as routes
from dvora.weight.updated_linear import pays, takes_updated_weight
from tests.cases import linear, randn, trained_layer
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 5, 3
MANY, FEW = 200, 3
DENSE, STRUCTURED = SharedProjections(3).impl, SharedProjections(3, "structured").impl


def taken(layer: nn.Module, tokens: int = MANY, dtype: torch.dtype = torch.float32, kind: object = DENSE) -> bool:
    return takes_updated_weight(layer.requires_grad_(False), randn(tokens, IN, seed=0, dtype=dtype), kind)


def test_many_tokens_for_a_small_layer_pay_for_the_updated_weight() -> None:
    # 2 x 1024 x 1024 multiply-adds by rank for V' twice, 3 x 1024 for a token's thin products; twice as much pays.
    assert not pays(1365, 1024, 1024)
    assert pays(1366, 1024, 1024)
    assert taken(linear(IN, OUT))
    assert not taken(linear(IN, OUT), tokens=FEW)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_forward_replaced(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    return layer


def hooked(register: str) -> Callable[[nn.Linear], nn.Linear]:
    def hook(layer: nn.Linear) -> nn.Linear:
        getattr(layer, register)(lambda *_: None)
        return layer

    return hook


@pytest.mark.parametrize(
    "change",
    [
        with_forward_replaced,
        hooked("register_forward_hook"),
        hooked("register_forward_pre_hook"),
        hooked("register_full_backward_hook"),
        hooked("register_full_backward_pre_hook"),
        lambda layer: Scaled(IN, OUT),
        lambda layer: layer.to("meta"),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ],
    ids=["forward", "hook", "pre-hook", "backward hook", "backward pre-hook", "subclass", "meta", "parametrized"],
)
def test_a_layer_whose_forward_is_more_than_its_product_is_called(change: Callable[[nn.Linear], nn.Module]) -> None:
    assert not taken(change(linear(IN, OUT)))


def test_a_hook_of_all_modules_is_obeyed() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not taken(linear(IN, OUT))
    finally:
        handle.remove()
    assert taken(linear(IN, OUT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_never_rounds_an_updated_weight(dtype: torch.dtype) -> None:
    assert not taken(linear(IN, OUT, dtype=dtype), dtype=dtype)
    assert not taken(linear(IN, OUT), dtype=dtype)
    with torch.autocast("cpu", dtype):
        assert not taken(linear(IN, OUT))


def test_other_situations_take_the_thin_products() -> None:
    assert not taken(linear(IN, OUT), kind=STRUCTURED)
    with torch.no_grad():
        assert not taken(linear(IN, OUT))
    with torch.inference_mode(), torch.enable_grad():
        assert not taken(linear(IN, OUT))
    assert not takes_updated_weight(linear(IN, OUT), randn(MANY, IN, seed=0), DENSE), "the weight is trained"
    layer, found = linear(IN, OUT).requires_grad_(False), []
    torch.func.vmap(lambda x: found.append(takes_updated_weight(layer, x, DENSE)) or x)(randn(2, MANY, IN, seed=0))
    assert found == [False]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("direction", ["unit", "weight"])
def test_both_ways_equal_the_dense_method(
    direction: str, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=dtype, direction=direction, bias=bias)
    layer.base_layer.requires_grad_(False)
    x, grad_output = randn(2, MANY, IN, seed=0, dtype=dtype), randn(2, MANY, OUT, seed=1, dtype=dtype)
    reference = DenseDVoRA.of(layer)
    dense = reference.gradients(x, grad_output)
    for worth_it in (0.0, float("inf")):
        monkeypatch.setattr(routes, "WORTH_IT", worth_it)
        assert takes_updated_weight(layer.base_layer, x, layer.shared.impl) == (worth_it == 0)
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(grad_output)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert worst_error(y, reference(x)) < tolerance
        assert worst_error(given.grad, dense["x"]) < tolerance
        for name, vector in layer.vectors._asdict().items():
            assert worst_error(vector.grad, dense[name]) < tolerance, name


def test_at_the_start_the_updated_weight_gives_the_bits_of_the_base() -> None:
    from dvora import DVoRAAdapter

    base = linear(IN, OUT)
    layer, x = DVoRAAdapter(base, RANK, shared=SharedProjections(3)), randn(MANY, IN, seed=0)
    assert takes_updated_weight(base, x, layer.shared.impl)
    assert torch.equal(layer(x), base(x))
