"""The norm's constants: kept or made again, in whatever dtype, they give one norm and one gradient."""

import pytest
import torch
from torch import Tensor

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.method.functional import Vectors
from dvora.weight.adapted_weight import MAGNITUDE_ONLY, AdaptedWeight
from dvora.weight.diagnostics import diagnostics
from dvora.weight.layouts import COLUMNS, EXPERTS, EXPERTS_TRANSPOSED, KERNELS, ROWS, Layout
from tests.cases import DIRECTIONS, SHARED, linear, nearly_cancelled, randn, trained_layer
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 8, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def values(dtype: torch.dtype, rank: int = RANK) -> Vectors:
    """Vectors as if trained."""
    wide = F64 if dtype == F64 else F32
    start = Vectors(randn(OUT, seed=4, dtype=wide).abs() + 0.5, randn(OUT, seed=5, dtype=wide), randn(rank, seed=6) / 3)
    return Vectors(*(vector.to(wide).requires_grad_() for vector in start))


def found(adapted: AdaptedWeight, weight: Tensor) -> list[Tensor]:
    """Gain, scale, and the gradients of all vectors."""
    vectors = values(weight.dtype, adapted.rank)
    *factors, _ = adapted.factors(vectors, weight)
    loss = sum((factor * torch.linspace(-1, 2, OUT).to(factor)).sum() + factor.square().sum() for factor in factors)
    gradients = torch.autograd.grad(loss, vectors, allow_unused=adapted.rank == MAGNITUDE_ONLY)
    return [*factors, *(gradient for gradient in gradients if gradient is not None)]


def kept_and_made_again_agree(weight: Tensor, rank: int = RANK, **options: object) -> AdaptedWeight:
    """The one without constants."""
    kept = AdaptedWeight(weight, rank, norm_cache=True, **options)
    again = AdaptedWeight(weight, rank, norm_cache=False, **options)
    assert kept.C is not None
    assert again.C is None
    results = [found(adapted, weight) for adapted in (kept, again)]
    assert len(results[0]) == len(results[1])
    for expected, value in zip(*results, strict=True):
        assert worst_error(value, expected) < TOLERANCE[value.dtype]
    return again


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_constants_made_again_equal_those_that_are_kept(distribution: str, dtype: torch.dtype, direction: str) -> None:
    weight = randn(OUT, IN, seed=1, dtype=dtype)
    for rank in (1, RANK, 20):
        kept_and_made_again_agree(weight, rank, shared=SharedProjections(3, distribution), direction=direction)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_they_do_with_a_padding_column(distribution: str, dtype: torch.dtype) -> None:
    weight, shared = randn(OUT, IN, seed=1, dtype=dtype), SharedProjections(3, distribution)
    again = kept_and_made_again_agree(weight, shared=shared, padding_column=2)
    dense = DenseDVoRA(weight, None, A_without(2, shared), shared.B(RANK, OUT, F64), *values(dtype))
    vectors, weights = values(dtype), torch.linspace(-1, 2, OUT, dtype=F64)
    gain = 1 + again.factors(vectors, weight).gain_minus_one
    assert worst_error(gain, dense.gain()) < TOLERANCE[dtype]
    (gain * weights).sum().backward()
    (dense.gain() * weights).sum().backward()
    for name, vector in vectors._asdict().items():
        assert worst_error(vector.grad, dense.get_parameter(name).grad) < TOLERANCE[dtype], name


def A_without(column: int, shared: SharedProjections) -> Tensor:
    return shared.A(RANK, IN, F64).index_fill(1, torch.tensor([column]), 0)


def test_rows_that_are_nearly_cancelled_leave_a_padding_column_alone() -> None:
    A, B, vectors = A_without(2, SHARED), SHARED.B(RANK, OUT, F64), values(F64)
    update = ((vectors.lambda_b[:, None] * B * vectors.lambda_d) @ A).detach()
    weight = 1e-2 * randn(OUT, IN, seed=1, dtype=F64) - update
    adapted = AdaptedWeight(weight, RANK, shared=SHARED, padding_column=2, direction="weight")
    dense = DenseDVoRA(weight, None, A, B, *vectors, direction="weight")
    assert float(dense.norm_ratio().min()) < 0.1
    assert worst_error(1 + adapted.factors(vectors, weight).gain_minus_one, dense.gain()) < 1e-12


@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (ROWS, (OUT, IN)),
        (COLUMNS, (IN, OUT)),
        (KERNELS, (OUT, 2, IN // 2)),
        (EXPERTS, (2, OUT // 2, IN)),
        (EXPERTS_TRANSPOSED, (2, IN, OUT // 2)),
    ],
    ids=["rows", "columns", "kernels", "experts", "experts transposed"],
)
def test_they_do_for_every_way_to_store_a_weight(distribution: str, layout: Layout, shape: tuple[int, ...]) -> None:
    weight, shared = randn(*shape, seed=1, dtype=F64), SharedProjections(3, distribution)
    again = kept_and_made_again_agree(weight, shared=shared, layout=layout)
    flat = AdaptedWeight(layout.matrix(weight).contiguous(), RANK, shared=shared)
    for value, expected in zip(found(again, weight), found(flat, layout.matrix(weight)), strict=True):
        assert worst_error(value, expected) < 1e-12


def test_a_magnitude_alone_needs_no_constants() -> None:
    weight = randn(OUT, IN, seed=1)
    again = kept_and_made_again_agree(weight, MAGNITUDE_ONLY, shared=SHARED)
    expected = values(F32).magnitude.detach() / weight.norm(dim=1) - 1
    assert worst_error(again.factors(values(F32, 0), weight).gain_minus_one, expected.double()) < 1e-6


@pytest.mark.parametrize("norm_cache", ["auto", True, False])
@pytest.mark.parametrize("detach_norm", [False, True])
def test_outputs_and_gradients_of_a_layer_are_those_of_the_dense_method(
    norm_cache: bool | str, detach_norm: bool
) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=F64, detach_norm=detach_norm)
    with_cache(layer, norm_cache)
    assert (layer.adapted.C is None) == (norm_cache is False)
    assert_dense(layer, 1e-12)


def with_cache(layer: DVoRAAdapter, norm_cache: bool | str) -> None:
    layer.adapted.norm_cache = norm_cache
    layer.adapted.refresh(layer.base_layer.weight)


def assert_dense(layer: DVoRAAdapter, tolerance: float) -> None:
    dense, x = DenseDVoRA.of(layer), randn(4, IN, seed=0, dtype=layer.base_layer.weight.dtype).requires_grad_()
    y = layer(x)
    assert worst_error(y, dense(x)) < tolerance
    expected = dense.gradients(x, torch.ones_like(y))
    y.sum().backward()
    assert worst_error(x.grad, expected["x"]) < tolerance
    for name, vector in layer.vectors._asdict().items():
        assert worst_error(vector.grad, expected[name]) < tolerance, name


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm_cache", [True, False])
@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_rows_that_are_nearly_cancelled_are_exact(norm_cache: bool, direction: str, ratio: float) -> None:
    layer = nearly_cancelled(trained_layer(IN, OUT, RANK, direction=direction), ratio)
    with_cache(layer, norm_cache)
    dense = DenseDVoRA.of(layer)
    assert float(dense.norm_ratio().max()) < 2 * ratio
    gain = 1 + layer.adapted.factors(layer.vectors, layer.base_layer.weight).gain_minus_one
    assert worst_error(gain, dense.gain()) < 1e-4 * 1e-3 / min(ratio, 1e-3)


def in_bfloat16(layer: DVoRAAdapter) -> None:
    """Keep the constants as those of a large weight are."""
    layer.adapted.C = layer.adapted.C.to(BF16)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_that_are_nearly_cancelled_are_exact_with_constants_of_bfloat16(direction: str) -> None:
    layer = nearly_cancelled(trained_layer(IN, OUT, RANK, dtype=F64, direction=direction), 1e-2)
    layer.adapted.refresh_if_stale(layer.base_layer.weight)
    in_bfloat16(layer)
    dense = DenseDVoRA.of(layer)
    gain = 1 + layer.adapted.factors(layer.vectors, layer.base_layer.weight).gain_minus_one
    assert worst_error(gain, dense.gain()) < 1e-11
    x = randn(4, IN, seed=0, dtype=F64)
    expected = dense.gradients(x, torch.ones(4, OUT))
    layer(x).sum().backward()
    for name, vector in layer.vectors._asdict().items():
        assert worst_error(vector.grad, expected[name]) < 1e-9, name


def test_constants_of_bfloat16_are_summed_in_float32() -> None:
    layer = trained_layer(IN, OUT, 64)
    with torch.no_grad():
        layer.lambda_b.mul_(0.05)
    in_bfloat16(layer)
    norm = layer.adapted.norm(layer.base_layer.weight)
    cross, _ = norm.terms(layer.lambda_d)
    assert cross.dtype == F32
    assert worst_error(cross, layer.adapted.C.double() @ layer.lambda_d.double()) < 1e-6
    exact = DenseDVoRA.of(layer).gain()
    gain = 1 + layer.adapted.factors(layer.vectors, layer.base_layer.weight).gain_minus_one
    assert 1e-6 < worst_error(gain, exact) < 1e-3


def test_constants_follow_a_weight_whether_they_are_kept_or_not() -> None:
    for norm_cache in (True, False):
        layer = trained_layer(IN, OUT, RANK, dtype=F64)
        with_cache(layer, norm_cache)
        layer(randn(1, IN, seed=0, dtype=F64))
        with torch.no_grad():
            layer.base_layer.weight.copy_(3 * randn(OUT, IN, seed=11, dtype=F64))
        assert_dense(layer, 1e-12)


def test_a_weight_that_is_trained_needs_no_constants_and_gets_its_gradient() -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=F64, freeze_base_layer=False)
    with_cache(layer, False)
    x = randn(4, IN, seed=0, dtype=F64)
    expected = DenseDVoRA.of(layer).gradients(x, torch.ones(4, OUT))
    layer(x).sum().backward()
    assert worst_error(layer.base_layer.weight.grad, expected["weight"]) < 1e-12


def test_without_constants_and_weight_there_is_no_norm() -> None:
    weight = linear(IN, OUT).weight.detach()
    adapted = AdaptedWeight(weight, RANK, shared=SHARED, norm_cache=False, name="model.q_proj")
    for missing in (None, weight.to("meta")):
        with pytest.raises(RuntimeError, match=r"model\.q_proj: the weight is not in memory .*norm_cache=True"):
            adapted.factors(values(F32), missing)


def test_with_constants_a_weight_is_not_needed() -> None:
    weight = linear(IN, OUT).weight.detach()
    adapted = AdaptedWeight(weight, RANK, shared=SHARED, norm_cache=True)
    expected = adapted.factors(values(F32), weight)
    for missing in (None, weight.to("meta")):
        assert diagnostics(adapted, values(F32), missing).keys() == diagnostics(adapted, values(F32), weight).keys()
        for value, reference in zip(adapted.factors(values(F32), missing)[:3], expected[:3], strict=True):
            assert torch.allclose(value, reference, atol=1e-6)


def test_a_row_that_is_nearly_cancelled_has_a_norm_without_the_weight() -> None:
    layer = nearly_cancelled(trained_layer(IN, OUT, RANK, dtype=F64), 1e-2)
    layer.adapted.refresh_if_stale(layer.base_layer.weight)
    results = [diagnostics(layer.adapted, layer.vectors, weight) for weight in (None, layer.base_layer.weight)]
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    found, expected = (layer.adapted.factors(layer.vectors, w) for w in (None, layer.base_layer.weight))
    assert worst_error(found.gain_minus_one, expected.gain_minus_one) < 1e-9


def test_a_magnitude_alone_needs_no_weight() -> None:
    weight = linear(IN, OUT).weight.detach()
    adapted = AdaptedWeight(weight, MAGNITUDE_ONLY, shared=SHARED, norm_cache=False)
    expected = adapted.factors(values(F32, 0), weight)
    assert torch.equal(adapted.factors(values(F32, 0), None).gain_minus_one, expected.gain_minus_one)


def test_a_weight_that_cannot_be_read_again_needs_constants() -> None:
    weight = linear(IN, OUT).weight.detach()
    with pytest.raises(ValueError, match=r'fc: norm_cache=False .* cannot be read .* use "auto" or True'):
        AdaptedWeight(weight, RANK, shared=SHARED, readable=False, norm_cache=False, name="fc")
    assert AdaptedWeight(weight, RANK, shared=SHARED, readable=False).C is not None
