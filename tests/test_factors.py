"""Row factors: those of the definition, alone, by row and many at once."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.factors import Factors, delta_weight, factor_rows, factors_of
from dvora.functional import Vectors
from dvora.layer import thin_outputs
from dvora.weight import AdaptedWeight
from tests.cases import DIRECTIONS, DTYPES, TOLERANCE, fresh_copy, linear, nearly_cancelled, randn, trained_layer
from tests.census import Census
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 9, 4

directions = pytest.mark.parametrize("direction", DIRECTIONS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def factors(layer: DVoRAAdapter, **options: Any) -> Factors:
    return factors_of(layer.adapted, layer.vectors, layer.base_layer.weight, **options)


@directions
@pytest.mark.parametrize("rank", [2, 5])
def test_derivatives_equal_finite_differences(rank: int, direction: str) -> None:
    weight, f64 = randn(4, 3, seed=1, dtype=torch.float64), torch.float64
    weight[1] = 0
    adapted = AdaptedWeight(weight, rank, shared=SharedProjections(3), direction=direction)
    shapes = [(2, 4), (2, 4), (2, rank)]
    vectors = [randn(*shape, seed=4 + i, dtype=f64).requires_grad_() for i, shape in enumerate(shapes)]

    def outputs(*vectors: Tensor) -> tuple[Tensor, ...]:
        return factors_of(adapted, Vectors(*vectors), strength=0.7)[:2]

    assert torch.autograd.gradcheck(outputs, vectors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(outputs, vectors)


@dtypes
@given(
    groups=st.sampled_from([1, 3]),
    at_once=st.sampled_from([2**7, 2**24]),
    direction=st.sampled_from(DIRECTIONS),
    detach_norm=st.booleans(),
    alpha=st.floats(0.1, 10),
)
def test_adapters_at_once_get_the_rows_that_they_get_one_by_one(
    dtype: torch.dtype, at_once: int, **options: Any
) -> None:
    shared = SharedProjections(3)
    bases = [randn(out, width, seed=out, dtype=dtype) for out, width in [(9, 6), (5, 7), (9, 6), (6, 8)]]
    # Parameters are read where lambda_d is by groups, others have constants instead.
    bases[2:] = [nn.Parameter(base, requires_grad=False) for base in bases[2:]]
    ranks = zip(bases, (4, 0, 4, 20), strict=True)
    weights = [AdaptedWeight(base, rank, shared=shared, **options) for base, rank in ranks]
    assert [w.reads_weight for w in weights] == [False, False, *[options["groups"] > 1] * 2]
    lengths = [n for w in weights for n in (w.out_features, w.out_features if w.rank else 0, w.lambda_d_size)]
    vectors = (0.5 + randn(3, sum(lengths), seed=1, dtype=dtype).abs()).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvora.weight._AT_ONCE", at_once)
        together = factor_rows(weights, vectors)
        ours = torch.autograd.grad(together.square().sum(), vectors)[0]
    for vector, row, gradient in zip(vectors, together, ours, strict=True):
        assert torch.equal(factor_rows(weights, vector[None])[0], row)
        leaf, alone = vector.detach().clone().requires_grad_(), []
        parts = iter(leaf.split(lengths))
        for adapted in weights:
            m, b, d = next(parts), next(parts), next(parts)
            alone.append(factors_of(adapted, Vectors(m, b if len(b) else torch.zeros_like(m), d)).row)
        assert worst_error(row, torch.cat(alone).double()) < TOLERANCE[dtype]
        (expected,) = torch.autograd.grad(torch.cat(alone).square().sum(), leaf)
        assert worst_error(gradient, expected.double()) < TOLERANCE[dtype]


def test_many_adapters_with_groups_need_no_more_memory_than_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvora.weight._AT_ONCE", 2**14)
    base = nn.Parameter(randn(64, 32, seed=1), requires_grad=False)
    for readable in (True, False):
        adapted = AdaptedWeight(base, 4, shared=SharedProjections(3), groups=8, readable=readable)
        vectors = randn(400, 64 + 64 + 32, seed=2).requires_grad_()
        with Census() as census:
            torch.autograd.grad(factor_rows([adapted], vectors).sum(), vectors)
        # Of all rows together, as the result is.
        assert census.largest() <= vectors.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 7), (5, 2, 3), (5, 0)], ids=str)
@given(bias=st.booleans())
def test_each_row_of_a_batch_gets_what_it_gets_alone(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    base = linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    adapted = AdaptedWeight(base.weight, RANK, shared=SharedProjections(3))
    wide, index = adapted.w.dtype, torch.tensor([2, 0, 2, 1, 2])
    values = (0.3 * randn(3, 2 * OUT + RANK, seed=1, dtype=wide)).requires_grad_()
    x = randn(*shape, IN, seed=8, dtype=dtype).requires_grad_()
    d = randn(*shape, OUT, seed=9, dtype=dtype)

    def outputs(x: Tensor, factors: Factors) -> Tensor:
        return thin_outputs(base(x), x, adapted, factors, base.bias)

    y = outputs(x, Factors.of_rows(values[index], RANK, x.dim()))
    ours = torch.autograd.grad(y, [x, values], d)
    parts = values.split([OUT, OUT, RANK], -1)
    single = [outputs(x[row], Factors(*(part[i] for part in parts))) for row, i in enumerate(index.tolist())]
    theirs = torch.autograd.grad(torch.stack(single), [x, values], d)
    for one, other in zip((y, *ours), (torch.stack(single), *theirs), strict=True):
        assert worst_error(one, other.double()) < max(10 * torch.finfo(one.dtype).eps, 1e-6 if wide != dtype else 0)
    with torch.no_grad():
        assert torch.equal(outputs(x, Factors.of_rows(values[index], RANK, x.dim())), y)


@dtypes
@pytest.mark.parametrize(("tokens", "rank"), [(2, 1), (20, 1), (20, 5)], ids=["thin", "folded", "above the width"])
def test_a_row_that_vanishes_altogether_gives_finite_numbers(tokens: int, rank: int, dtype: torch.dtype) -> None:
    layer = nearly_cancelled(trained_layer(3, 4, rank, dtype=dtype), 0.0)
    x = randn(tokens, 3, seed=8, dtype=dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *layer.vectors))


@directions
def test_the_delta_has_the_precision_of_the_forward(direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, direction=direction)
    with torch.autocast("cpu", torch.bfloat16):
        delta = delta_weight(layer.adapted, layer.vectors, layer.base_layer.weight)
    dense = DenseDVoRA.of(layer)
    assert worst_error(delta, dense.merged_weight() - dense.weight) < 1e-5


def test_norms_of_vectors_in_half_precision_are_not() -> None:
    dtype = torch.bfloat16
    for rank in (RANK, IN + 1):
        layer, x = trained_layer(IN, OUT, rank), randn(4, IN, seed=0)
        for vector in layer.vectors:
            vector.data = vector.data.to(dtype).float()
        outputs, expected = layer(x), torch.autograd.grad(layer(x).square().sum(), layer.vectors)
        for vector in layer.vectors:
            vector.data = vector.data.to(dtype)
        assert torch.equal(layer(x), outputs)
        for ours, whole in zip(torch.autograd.grad(layer(x).square().sum(), layer.vectors), expected, strict=True):
            assert ours.dtype == dtype
            assert worst_error(ours, whole.double()) < 2 * torch.finfo(dtype).eps


# Factors that an evaluation keeps; what a change makes of them is in `test_changes`.


@torch.no_grad()
def test_factors_are_kept_while_nothing_changes_and_not_beside_a_gradient() -> None:
    layer = trained_layer(IN, OUT, RANK)
    first = factors(layer)
    assert factors(layer) is first
    assert factors(layer, strength=0.5) is not first
    assert factors(layer.double()).scale.dtype == torch.float64
    for vector in layer.vectors:
        vector.grad = torch.zeros_like(vector)
        assert factors(layer) is not factors(layer)
        vector.grad = None
    with torch.inference_mode():
        layer.vectors.magnitude.mul_(2)
        torch.testing.assert_close(factors(layer).gain, 2 * first.gain.double())
        assert factors(layer) is factors(layer)


@pytest.mark.parametrize("size", [OUT, 2**18])
def test_other_vectors_do_not_come_to_have_the_address_of_those_that_were_kept(size: int) -> None:
    layer = trained_layer(2, size, 1).requires_grad_(False)
    magnitude, gain = layer.magnitude.clone(), factors(layer).gain
    for factor in range(1, 9):
        layer.magnitude.data = factor * magnitude
        assert torch.allclose(factors(layer).gain, factor * gain)
        layer.magnitude.data = torch.empty(1)


WIDTH = 6
RANKS = {"thin": (4, RANK), "folded": (40, RANK), "folded, above the width": (40, WIDTH + 3)}
"""Tokens and rank for which training is computed that way."""


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("way", RANKS)
def test_threads_may_train_and_evaluate_one_model_at_once(way: str) -> None:
    tokens, rank = RANKS[way]
    model = nn.Sequential(*(trained_layer(WIDTH, WIDTH, rank) for _ in range(3)))
    alone = nn.Sequential(*(fresh_copy(layer) for layer in model))
    x, trained = randn(tokens, WIDTH, seed=8), [each for each in model.parameters() if each.requires_grad]

    def gradients(of: nn.Module, values: list[nn.Parameter]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of(x).square().sum(), values)

    expected = gradients(alone, [each for each in alone.parameters() if each.requires_grad])
    evaluated = alone.eval()(x).detach()

    def run(index: int) -> None:
        for _ in range(5):
            if index % 2:
                for ours, theirs in zip(gradients(model, trained), expected, strict=True):
                    assert worst_error(ours, theirs.double()) < 1e-5
            else:
                with torch.no_grad():
                    assert worst_error(model(x), evaluated.double()) < 1e-5

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(6)))
