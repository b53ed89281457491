"""A linear layer through its updated weight, against float64 autograd of the plain formula."""

import torch
from dvora.method.updated_weight import updated_linear
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from dvora import SharedProjections
from tests.cases import randn
from tests.reference import worst_error

SHARED = SharedProjections(3)


def arguments(in_features: int, out_features: int, rank: int, tokens: list[int]) -> list[Tensor]:
    """x, weight, bias, lambda_d, beta."""
    shapes = [(*tokens, in_features), (out_features, in_features), (out_features,), (rank,), (out_features,)]
    return [randn(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes)]


def outputs(x: Tensor, weight: Tensor, bias: Tensor, lambda_d: Tensor, beta: Tensor) -> Tensor:
    z = SHARED.impl.project(x, len(lambda_d))
    return updated_linear(x, z, weight, bias, lambda_d, beta, SHARED.impl)


def plain(x: Tensor, weight: Tensor, bias: Tensor, lambda_d: Tensor, beta: Tensor) -> Tensor:
    A = SHARED.A(len(lambda_d), weight.shape[1], torch.float64)
    B = SHARED.B(len(lambda_d), len(weight), torch.float64)
    return x @ (weight + (beta[:, None] * B * lambda_d) @ A).T + bias


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12)),
    tokens=st.lists(st.integers(0, 4), max_size=2),
)
def test_outputs_and_gradients_of_any_shape_equal_the_plain_formula(
    sizes: tuple[int, int, int], tokens: list[int]
) -> None:
    given_ = arguments(*sizes, tokens)
    grad_output = randn(*tokens, sizes[1], seed=9, dtype=torch.float64)
    results = []
    for function in (outputs, plain):
        x, weight, *rest = (t.clone() for t in given_)
        leaves = [x.requires_grad_(), *(t.requires_grad_() for t in rest)]
        y = function(x, weight, *rest)
        results.append([y, *torch.autograd.grad(y, leaves, grad_output)])
    for ours, expected in zip(*results, strict=True):
        assert worst_error(ours, expected) < 1e-12


def test_derivatives_of_higher_order() -> None:
    x, weight, *rest = arguments(4, 5, 3, [2])
    leaves = (x.requires_grad_(), *(t.requires_grad_() for t in rest))
    assert gradcheck(lambda x, *rest: outputs(x, weight, *rest), leaves)
    assert gradgradcheck(lambda x, *rest: outputs(x, weight, *rest), leaves)


def test_neither_the_inputs_nor_the_updated_weight_are_kept() -> None:
    x, weight, *rest = arguments(7, 5, 3, [20])
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in rest)]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs(leaves[0], weight, *leaves[1:])
    own = weight.untyped_storage().data_ptr()
    assert x.shape not in [tensor.shape for tensor in kept]
    assert not [t for t in kept if t.shape == weight.shape and t.untyped_storage().data_ptr() != own]
