"""A linear layer through its updated weight, against float64 autograd of the plain formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from tests.cases import randn
from tests.checked import checked
from tests.reference import worst_error
from tests.weight.thin_products import AdaptedWeight, F, PackedFactors, PassFactors, Update

SHARED = checked("matrices.interface").SharedProjections(3)
updated_linear = checked("weight.updated_linear").updated_linear
both_directions = pytest.mark.parametrize("direction", ["unit", "weight"])


class Case:
    """A layer, and what is trained: x, bias, lambda_d, lambda_b, g - 1."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        tokens: list[int],
        direction: str = "weight",
        dtype: torch.dtype = torch.float64,
        bias: bool = True,
    ) -> None:
        self.layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
        self.layer.weight.copy_(randn(out_features, in_features, seed=1, dtype=dtype))
        self.adapted = AdaptedWeight(self.layer.weight, rank, shared=SHARED, direction=direction, alpha=0.5 * rank)
        shapes = [(*tokens, in_features), (out_features,), (rank,), (out_features,), (out_features,)]
        leaves = [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
        self.leaves = [t for t in leaves if bias or t is not leaves[1]]
        self.has_bias = bias
        # V' includes the update, so only g - 1 reaches the outputs.
        self.scale = torch.full((out_features,), torch.nan, dtype=dtype)

    def trained(self) -> list[Tensor]:
        self.leaves = [leaf.detach().clone().requires_grad_() for leaf in self.leaves]
        return self.leaves

    def outputs(self, x: Tensor, *rest: Tensor) -> Tensor:
        bias, lambda_d, lambda_b, gain_minus_one = rest if self.has_bias else (None, *rest)
        trained = torch.stack([gain_minus_one, self.scale])
        packed = PackedFactors(trained, torch.stack([1 + gain_minus_one, -gain_minus_one]).detach(), lambda_d)
        layer = nn.Linear(*reversed(self.layer.weight.shape), bias=bias is not None, dtype=x.dtype)
        layer.weight = self.layer.weight
        if bias is not None:
            del layer.bias
            layer.bias = bias
        vectors = F.Vectors(self.adapted.w, lambda_b, lambda_d)
        return updated_linear(Update(self.adapted, vectors, PassFactors(packed), self.adapted.matrices), layer, x)

    def plain(self, x: Tensor, *rest: Tensor) -> Tensor:
        bias, lambda_d, lambda_b, gain_minus_one = rest if self.has_bias else (0, *rest)
        weight = self.layer.weight.to(x.dtype)
        A = SHARED.A(len(lambda_d), weight.shape[1], torch.float64)
        B = SHARED.B(len(lambda_d), len(weight), torch.float64)
        unit = weight.norm(dim=1) if self.adapted.direction == "unit" else 1.0
        updated = weight + ((0.5 * unit * lambda_b)[:, None] * B * lambda_d) @ A
        return (1 + gain_minus_one) * (x @ updated.T) + bias

    def assert_exact(self, tolerance: float) -> None:
        dtype = self.layer.weight.dtype
        leaves, wide = self.trained(), [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        y, expected = self.outputs(*leaves), self.plain(*wide)
        grad_output = randn(*y.shape, seed=9, dtype=dtype)
        assert y.dtype == dtype
        assert worst_error(y, expected) < tolerance
        found = torch.autograd.grad(y, leaves, grad_output)
        for ours, theirs in zip(found, torch.autograd.grad(expected, wide, grad_output.double()), strict=True):
            assert worst_error(ours, theirs) < tolerance


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12)),
    tokens=st.lists(st.integers(0, 4), max_size=2),
    direction=st.sampled_from(["unit", "weight"]),
    bias=st.booleans(),
)
def test_outputs_and_gradients_of_any_shape_equal_the_plain_formula(
    sizes: tuple[int, int, int], tokens: list[int], direction: str, bias: bool
) -> None:
    Case(*sizes, tokens, direction, bias=bias).assert_exact(1e-12)


@both_directions
def test_outputs_and_gradients_in_float32_equal_the_plain_formula(direction: str) -> None:
    Case(40, 60, 12, [5, 80], direction, torch.float32).assert_exact(1e-5)


@both_directions
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_derivatives_of_higher_order(bias: bool, direction: str) -> None:
    case = Case(4, 5, 3, [2], direction, bias=bias)
    assert gradcheck(case.outputs, case.trained(), check_batched_grad=True)
    assert gradgradcheck(case.outputs, case.trained())


@pytest.mark.parametrize("frozen", range(5))
def test_any_of_the_operands_may_be_frozen(frozen: int) -> None:
    case = Case(4, 5, 3, [6])
    leaves = case.trained()
    expected = torch.autograd.grad(case.outputs(*leaves).square().sum(), leaves)
    leaves[frozen].requires_grad_(False)
    rest = [leaf for leaf in leaves if leaf.requires_grad]
    for create_graph in (False, True):
        found = torch.autograd.grad(case.outputs(*leaves).square().sum(), rest, create_graph=create_graph)
        others = [gradient for leaf, gradient in zip(leaves, expected, strict=True) if leaf.requires_grad]
        for ours, theirs in zip(found, others, strict=True):
            assert worst_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_scale_of_the_update_gets_a_gradient_of_zero(create_graph: bool) -> None:
    case = Case(7, 5, 3, [20])
    case.scale = randn(5, seed=8, dtype=torch.float64).requires_grad_()
    y = case.outputs(*case.trained())
    assert worst_error(y, case.plain(*case.leaves)) < 1e-12
    (gradient,) = torch.autograd.grad(y.square().sum(), case.scale, create_graph=create_graph)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_untrained_outputs_are_those_of_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    case = Case(7, 5, 3, [20], dtype=dtype)
    x, bias, lambda_d, lambda_b, gain_minus_one = case.leaves
    y = case.outputs(x, bias, lambda_d, torch.zeros_like(lambda_b), torch.zeros_like(gain_minus_one))
    assert torch.equal(y, nn.functional.linear(x, case.layer.weight, bias))


def test_neither_the_inputs_nor_the_updated_weight_are_kept() -> None:
    case = Case(7, 5, 3, [20])
    leaves, kept = case.trained(), list[Tensor]()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.outputs(*leaves)
    weight = case.layer.weight
    own = weight.untyped_storage().data_ptr()
    assert leaves[0].shape not in [tensor.shape for tensor in kept]
    assert not [t for t in kept if t.shape == weight.shape and t.untyped_storage().data_ptr() != own]
    assert [tensor.shape for tensor in kept].count((20, 5)) == 1


def test_a_weight_that_is_written_to_before_the_backward_pass_is_noticed() -> None:
    case = Case(7, 5, 3, [20])
    y = case.outputs(*case.trained())
    case.layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
