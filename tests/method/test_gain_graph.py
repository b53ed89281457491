"""What the gain of a frozen weight keeps for its backward pass, and derivatives of higher order."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from dvora import functional as F
from dvora.matrices import dense
from dvora.method.gain import row_factors
from dvora.weight.adapted_weight import AdaptedWeight
from tests.cases import randn, trained_layer
from tests.method.frozen_weight import NAMES, Problem, c_kept_or_not, every_distribution
from tests.reference import worst_error

IN, OUT, RANK = 6, 9, 4


def problem(distribution: str = "kaiming_uniform", **options: object) -> Problem:
    p = Problem(IN, OUT, RANK, distribution=distribution, **options)
    for vector in p.vectors:
        vector.requires_grad_()
    return p


@every_distribution
@c_kept_or_not
@pytest.mark.parametrize("padding_column", [None, 2])
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
@pytest.mark.parametrize("small", [True, False], ids=["small half_dq", "large half_dq"])
def test_vectors_and_a_small_half_dq_are_kept_for_the_backward_pass(
    distribution: str,
    keep_C: bool,
    padding_column: int | None,
    detach_norm: bool,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "_KEPT_BYTES", 8 * RANK * OUT if small else 8 * RANK * OUT - 1)
    p = problem(distribution, padding_column=padding_column, detach_norm=detach_norm)
    norm, beta, kept = p.norm(keep_C), p.beta(), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        p.gain_minus_one(norm)
    # The weight itself, where it is read again, takes no memory.
    own = norm.matrix.untyped_storage().data_ptr()
    kept = [tensor.shape for tensor in kept if tensor.untyped_storage().data_ptr() != own]
    assert kept
    half_dq = small and not detach_norm and distribution != "structured"
    assert set(kept) - {(OUT,), (RANK,)} == ({(RANK, OUT)} if half_dq else set())
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        F.row_factors(p.vectors, norm, beta)
    assert not set(kept) <= {(OUT,), (RANK,)}, "the plain function keeps matrices: the test can see them"


@every_distribution
@c_kept_or_not
@pytest.mark.parametrize("padding_column", [None, 2])
def test_first_and_second_derivatives_are_those_of_the_values(
    distribution: str, keep_C: bool, padding_column: int | None
) -> None:
    p = problem(distribution, padding_column=padding_column)
    norm = p.norm(keep_C)

    def factors(magnitude: Tensor, beta: Tensor, lambda_d: Tensor) -> tuple[Tensor, Tensor]:
        return row_factors(F.Vectors(magnitude, beta, lambda_d), norm, beta)[:2]

    inputs = p.vectors.magnitude, p.beta().detach().requires_grad_(), p.vectors.lambda_d
    assert gradcheck(factors, inputs)
    assert gradgradcheck(factors, inputs)


@pytest.mark.parametrize("rows", [[], [1, 4]], ids=["plain", "with nearly cancelled rows"])
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
def test_second_derivatives_equal_the_dense_method(detach_norm: bool, rows: list[int]) -> None:
    p = Problem(IN, OUT, RANK, detach_norm=detach_norm).cancel(1e-1, rows)
    for vector in p.vectors:
        vector.requires_grad_()
    dense = p.dense()
    expected = second_derivatives(dense.gain() - 1, [dense.get_parameter(name) for name in NAMES])
    for name, ours, theirs in zip(NAMES, second_derivatives(p.gain_minus_one(), [*p.vectors]), expected, strict=True):
        assert worst_error(ours, theirs) < 1e-9, name


def second_derivatives(gain: Tensor, vectors: list[Tensor]) -> tuple[Tensor, ...]:
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(gain.square().sum(), vectors, create_graph=True, **options)
    return torch.autograd.grad(sum(g.square().sum() for g in first), vectors, **options)


@pytest.mark.parametrize("rows", [[], [1, 4]], ids=["plain", "with nearly cancelled rows"])
@pytest.mark.parametrize("trained", [t for t in product([True, False], repeat=3) if any(t)], ids=str)
def test_any_of_the_vectors_may_be_frozen(trained: tuple[bool, ...], rows: list[int]) -> None:
    p = Problem(IN, OUT, RANK).cancel(1e-2, rows)
    expected = p.gradients()
    for vector, wanted in zip(p.vectors, trained, strict=True):
        vector.requires_grad_(wanted)
    for create_graph in (False, True):
        inputs = [vector for vector in p.vectors if vector.requires_grad]
        found = torch.autograd.grad(p.loss(), inputs, create_graph=create_graph)
        names = [name for name, wanted in zip(NAMES, trained, strict=True) if wanted]
        for name, gradient in zip(names, found, strict=True):
            assert worst_error(gradient, expected[name]) < 1e-12, name


def test_the_gradients_of_a_plain_backward_pass_carry_no_graph() -> None:
    assert not any(gradient.requires_grad for gradient in problem().gradients().values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same_bits(context: type) -> None:
    p = problem()
    expected = p.gain_minus_one()
    with context():
        values = p.gain_minus_one()
    assert torch.equal(values, expected)
    assert not values.requires_grad


def test_a_weight_that_is_written_to_before_the_backward_pass_is_refused() -> None:
    layer = trained_layer(6, 5, 3)
    layer.adapted = AdaptedWeight(layer.base_layer.weight, 3, shared=layer.shared, norm_cache=False)
    y = layer(randn(4, 6, seed=0)).sum()
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
