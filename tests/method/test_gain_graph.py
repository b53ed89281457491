"""What the gain of a frozen weight keeps for its backward pass, and derivatives of higher order."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dvora.matrices import dense
from dvora.weight.adapted_weight import AdaptedWeight
from tests.cases import randn, trained_layer
from tests.census import Census
from tests.method.frozen_weight import NAMES, F, Layers, Problem, c_kept_or_not, every_distribution, row_factors
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
@pytest.mark.parametrize("count", [1, 3], ids=["one layer", "three layers"])
def test_vectors_and_a_small_half_dq_are_kept_for_the_backward_pass(
    count: int,
    distribution: str,
    keep_C: bool,
    padding_column: int | None,
    detach_norm: bool,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = "_KEPT_BYTES" if count == 1 else "_KEPT_BYTES_OF_ALL"
    monkeypatch.setattr(dense, limit, count * 8 * RANK * OUT - (0 if small else 1))
    options = {"distribution": distribution, "padding_column": padding_column, "detach_norm": detach_norm}
    layers = Layers(count, IN, OUT, RANK, **options).trained()
    norms = layers.norms(keep_C)
    layers.stacked(norms)  # makes the matrices
    with Census() as census:
        made = layers.stacked(norms)
    held = census.held()
    half_dq = small and not detach_norm and distribution != "structured"
    of_half_dq = 8 * count * RANK * OUT
    assert held.count(of_half_dq) == half_dq
    # Factors as rows of two and of three, the vectors, and what the gradients are computed from.
    vectors = 8 * count * (13 * OUT + 2 * RANK)
    assert sum(held) <= vectors + half_dq * of_half_dq
    assert max(held) <= max(8 * count * 3 * OUT, half_dq * of_half_dq)
    del made
    assert not census.held()
    with Census() as census:
        kept = [F.row_factors(p.vectors, norm, p.beta()) for p, norm in zip(layers.problems, norms, strict=True)]
    assert sum(census.held()) > vectors, "the plain function keeps more: the test can see it"
    del kept


@every_distribution
@c_kept_or_not
@pytest.mark.parametrize("padding_column", [None, 2])
def test_first_and_second_derivatives_are_those_of_the_values(
    distribution: str, keep_C: bool, padding_column: int | None
) -> None:
    p = problem(distribution, padding_column=padding_column)
    norm = p.norm(keep_C)

    def factors(*vectors: Tensor) -> tuple[Tensor, Tensor]:
        packed = row_factors([F.Vectors(*vectors)], [norm], p.settings).packed[0]
        return packed.trained, packed.lambda_d

    assert gradcheck(factors, list(p.vectors), check_batched_grad=True, check_undefined_grad=False)
    assert gradgradcheck(factors, list(p.vectors))


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
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
def test_any_of_the_vectors_may_be_frozen(detach_norm: bool, trained: tuple[bool, ...], rows: list[int]) -> None:
    p = Problem(IN, OUT, RANK, detach_norm=detach_norm).cancel(1e-2, rows)
    p.lambda_gradient = randn(RANK, seed=9, dtype=torch.float64)
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
    expected = p.packed()
    with context():
        values = p.packed()
    assert expected.trained.requires_grad
    assert expected.lambda_d.requires_grad
    assert not expected.constant.requires_grad
    for value, reference in zip(values, expected, strict=True):
        assert torch.equal(value, reference)
        assert not value.requires_grad


def test_a_weight_that_is_written_to_before_the_backward_pass_is_refused() -> None:
    layer = trained_layer(6, 5, 3)
    layer.adapted = AdaptedWeight(layer.base_layer.weight, 3, shared=layer.shared, norm_cache=False)
    y = layer(randn(4, 6, seed=0)).sum()
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="a base weight was written to between the forward and the backward pass"):
        y.backward()
