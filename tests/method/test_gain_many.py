"""The row factors of many adapters in several layers at once: those of each adapter in each layer, with gradients."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from tests.cases import TOLERANCE, randn
from tests.checked import checked
from tests.method.frozen_weight import (
    F,
    FrozenNorm,
    Layers,
    Problem,
    both_directions,
    both_dtypes,
    c_kept_or_not,
    every_distribution,
    row_factors,
)
from tests.reference import worst_error

_gain = checked("method.gain")
row_factors_of_many = _gain.row_factors_of_many
IN, OUT, RANK, ADAPTERS = 6, 9, 4, 3
detached_or_not = pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
one_and_three = pytest.mark.parametrize("count", [1, 3], ids=lambda count: f"{count} layers")


class Many:
    """Adapters in layers of one shape, each with weights of its factors in a loss."""

    def __init__(
        self, count: int, *options: object, ratio: float | None = None, rank: int = RANK, **named: object
    ) -> None:
        self.layers = Layers(count, IN if ratio is None else 16, OUT, rank, *options, **named).problems
        if ratio is not None:
            self.layers[-1].cancel(ratio, [1, 4])
        self.vectors = F.Vectors(*(self._stacked(kind) for kind in range(3)))
        dtype, shape = self.layers[0].weight.dtype, (count, ADAPTERS)
        self.of_trained = randn(*shape, 2, OUT, seed=50, dtype=dtype)
        self.of_lambda_d = randn(*shape, rank, seed=51, dtype=dtype)

    def _stacked(self, kind: int) -> Tensor:
        """The first adapter is the problem's own, the others are like it."""
        rows = []
        for number, problem in enumerate(self.layers):
            own = problem.vectors[kind]
            others = [
                randn(*own.shape, seed=90 + 10 * number + 3 * n + kind, dtype=own.dtype) for n in range(1, ADAPTERS)
            ]
            rows.append(torch.stack([own, *(own * (1 + 0.3 * other) for other in others)]))
        return torch.stack(rows)

    def asking(self) -> F.Vectors:
        return F.Vectors(*(vector.detach().clone().requires_grad_() for vector in self.vectors))

    def norms(self, keep_C: bool = True, keep_weight: bool = True) -> list[FrozenNorm]:
        return [problem.norm(keep_C, keep_weight) for problem in self.layers]

    def made(self, vectors: F.Vectors, norms: list[FrozenNorm]) -> tuple[Tensor, Tensor]:
        return row_factors_of_many(vectors, norms, self.layers[0].settings)

    def each(self, vectors: F.Vectors, norms: list[FrozenNorm]) -> tuple[Tensor, Tensor]:
        """By the function for one adapter, one after the other."""
        rows = []
        for layer, norm in enumerate(norms):
            own = [F.Vectors(*(vector[layer, n] for vector in vectors)) for n in range(ADAPTERS)]
            packed = [row_factors([each], [norm], self.layers[0].settings).packed[0] for each in own]
            factors = [(of_adapter.trained, of_adapter.lambda_d) for of_adapter in packed]
            rows.append([torch.stack(of_kind) for of_kind in zip(*factors, strict=True)])
        return tuple(torch.stack(of_kind) for of_kind in zip(*rows, strict=True))

    def loss(self, made: tuple[Tensor, Tensor]) -> Tensor:
        trained, lambda_d = made
        return (trained * self.of_trained).sum() + (lambda_d * self.of_lambda_d).sum()

    def dense(self, layer: int, adapter: int) -> Problem:
        """One adapter in one layer, whose factors are summed as in the loss."""
        problem = self.layers[layer]
        found = Problem.__new__(Problem)
        vars(found).update(vars(problem))
        found.vectors = F.Vectors(*(vector[layer, adapter] for vector in self.vectors))
        found.loss_gradient, found.scale_gradient = self.of_trained[layer, adapter]
        found.lambda_gradient = self.of_lambda_d[layer, adapter]
        return found


def assert_equal_to_each_and_to_the_dense_method(many: Many, norms: list[FrozenNorm], tolerance: float) -> None:
    with torch.no_grad():
        without = many.made(many.vectors, norms)
    vectors, others = many.asking(), many.asking()
    made, each = many.made(vectors, norms), many.each(others, norms)
    assert made[0].shape == (len(norms), ADAPTERS, 2, OUT)
    for own, plain, other in zip(made, without, each, strict=True):
        assert worst_error(own, other.double()) < tolerance / 10
        assert worst_error(plain, other.double()) < tolerance / 10
    found = torch.autograd.grad(many.loss(made), vectors)
    for own, other in zip(found, torch.autograd.grad(many.loss(each), others), strict=True):
        assert worst_error(own, other.double()) < tolerance
    for layer in range(len(norms)):
        for adapter in range(ADAPTERS):
            one = many.dense(layer, adapter)
            reference = one.dense()
            assert worst_error(made[0][layer, adapter, 0], reference.gain() - 1) < tolerance
            assert worst_error(made[0][layer, adapter, 1], reference.scale()) < tolerance
            for own, expected in zip(found, one.dense_gradients().values(), strict=True):
                assert worst_error(own[layer, adapter], expected) < tolerance


@both_dtypes
@both_directions
@every_distribution
@detached_or_not
@c_kept_or_not
@one_and_three
def test_factors_and_gradients_are_those_of_each_adapter(
    count: int, keep_C: bool, detach_norm: bool, distribution: str, direction: str, dtype: torch.dtype
) -> None:
    many = Many(count, dtype, distribution, scaling=0.25, direction=direction, detach_norm=detach_norm)
    assert_equal_to_each_and_to_the_dense_method(many, many.norms(keep_C), TOLERANCE[dtype])


@both_dtypes
@both_directions
@detached_or_not
@c_kept_or_not
@one_and_three
def test_rows_that_one_adapter_nearly_cancels_are_measured(
    count: int, keep_C: bool, detach_norm: bool, direction: str, dtype: torch.dtype
) -> None:
    ratio = 1e-2
    many = Many(count, dtype, ratio=ratio, direction=direction, detach_norm=detach_norm)
    assert many.dense(count - 1, 0).dense().norm_ratio()[[1, 4]].max() < 3 * ratio
    assert_equal_to_each_and_to_the_dense_method(many, many.norms(keep_C), 40 * torch.finfo(dtype).eps / ratio)
    if keep_C:
        with torch.no_grad():
            measured, computed = (many.made(many.vectors, many.norms(keep_weight=kept))[0] for kept in (True, False))
        assert not torch.equal(measured[-1, 0, :, [1, 4]], computed[-1, 0, :, [1, 4]])


@both_directions
@c_kept_or_not
@pytest.mark.parametrize("ratio", [None, 1e-2], ids=["plain", "nearly cancelled"])
def test_second_derivatives_are_those_of_each_adapter(ratio: float | None, keep_C: bool, direction: str) -> None:
    many = Many(2, direction=direction, ratio=ratio)
    found = []
    for make in (many.made, many.each):
        vectors = many.asking()
        trained, lambda_d = make(vectors, many.norms(keep_C))
        loss = many.loss((trained.square(), lambda_d.square()))
        first = torch.autograd.grad(loss, vectors, create_graph=True)
        total = sum((grad * randn(*grad.shape, seed=70 + k, dtype=grad.dtype)).sum() for k, grad in enumerate(first))
        found.append([*first, *torch.autograd.grad(total, vectors)])
    for own, other in zip(*found, strict=True):
        assert worst_error(own, other) < (1e-11 if ratio is None else 1e-8)


def test_batches_of_gradients_are_those_of_one_after_the_other() -> None:
    many = Many(2)
    vectors = many.asking()
    trained, lambda_d = many.made(vectors, many.norms())
    both = (
        randn(4, *trained.shape, seed=60, dtype=torch.float64),
        randn(4, *lambda_d.shape, seed=61, dtype=torch.float64),
    )
    found = torch.autograd.grad((trained, lambda_d), vectors, both, is_grads_batched=True, retain_graph=True)
    each = [
        torch.autograd.grad((trained, lambda_d), vectors, one, retain_graph=True) for one in zip(*both, strict=True)
    ]
    for own, others in zip(found, zip(*each, strict=True), strict=True):
        assert worst_error(own, torch.stack(others)) < 1e-12


@pytest.mark.parametrize("used", ["trained", "lambda_d"])
def test_factors_of_which_only_some_are_used(used: str) -> None:
    many = Many(2)
    vectors, others = many.asking(), many.asking()
    found = []
    for each, make in ((vectors, many.made), (others, many.each)):
        trained, lambda_d = make(each, many.norms())
        loss = (trained * many.of_trained).sum() if used == "trained" else (lambda_d * many.of_lambda_d).sum()
        found.append(torch.autograd.grad(loss, each, materialize_grads=True, allow_unused=True))
    for own, other in zip(*found, strict=True):
        assert worst_error(own, other) < 1e-12


def test_rows_of_zeros_have_a_gain_of_one() -> None:
    many = Many(2)
    many.layers[0].weight[3] = 0
    trained, _ = many.made(many.asking(), many.norms())
    assert not trained[0, :, 0, 3].any()
    assert_equal_to_each_and_to_the_dense_method(many, many.norms(), 1e-12)


def test_a_magnitude_only() -> None:
    many = Many(2)
    vectors = many.vectors._replace(lambda_b=0 * many.vectors.lambda_b, lambda_d=many.vectors.lambda_d[..., :0])
    norms = [norm._replace(C=None, rank=0) for norm in many.norms()]
    trained, lambda_d = many.made(vectors, norms)
    w = torch.stack([norm.w for norm in norms])[:, None]
    torch.testing.assert_close(trained[:, :, 0], vectors.magnitude / w - 1)
    assert not trained[:, :, 1].any()
    assert lambda_d.shape == (2, ADAPTERS, 0)


def test_a_wrong_shape_is_refused_by_the_checked_copy() -> None:
    many = Many(2)
    with pytest.raises(TypeCheckError):
        many.made(F.Vectors(*(vector[0] for vector in many.vectors)), many.norms()[0])
