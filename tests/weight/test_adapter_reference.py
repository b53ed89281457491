"""The adapter against the dense float64 method: outputs, every gradient, merge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvora import DVoRAAdapter
from tests.cases import DIRECTIONS, LARGE_SIZES, SIZES, TOLERANCE, nearly_cancelled, randn, trained_layer
from tests.reference import DenseDVoRA, worst_error

VARIANTS = [
    pytest.param({}, id="defaults"),
    pytest.param({"alpha": 5.5}, id="alpha"),
    pytest.param({"bias": False}, id="no bias"),
    pytest.param({"detach_norm": True}, id="detach_norm"),
    pytest.param({"freeze_base_layer": False}, id="trained base"),
    pytest.param({"freeze_base_layer": False, "detach_norm": True, "alpha": 0.3}, id="trained base, detach_norm"),
]

pytestmark = pytest.mark.filterwarnings("ignore::dvora.weight.merge.MergePrecisionWarning")


def gradients(layer: DVoRAAdapter, x: Tensor, output_gradient: Tensor) -> dict[str, Tensor]:
    """Gradients of one backward pass by autograd, by the reference's names."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).backward(output_gradient)
    trained = {name.removeprefix("base_layer."): p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"x": x.grad, **trained}


def inputs(layer: DVoRAAdapter, tokens: int = 11) -> tuple[Tensor, Tensor]:
    """Inputs and a gradient of the outputs."""
    base = layer.base_layer
    dtype = base.weight.dtype
    x, grad_output = randn(tokens, base.in_features, seed=8), randn(tokens, base.out_features, seed=9)
    return x.to(dtype), grad_output.to(dtype)


def assert_equal_to_the_dense_method(layer: DVoRAAdapter, tolerance: float, tokens: int = 11) -> None:
    dense = DenseDVoRA.of(layer)
    x, grad_output = inputs(layer, tokens)
    assert worst_error(layer(x), dense(x)) < tolerance
    assert worst_error(layer.merge_to_original_layer().weight, dense.merged_weight()) < tolerance
    expected = dense.gradients(x, grad_output)
    if layer.base_layer.in_features == 1 and not layer.adapted.detach_norm:
        # A row of one value has no direction: these vanish, and their rounding errors have nothing to be relative to.
        for name in ("lambda_b", "lambda_d", "weight"):
            expected.pop(name)
    ours = gradients(layer, x, grad_output)
    for name in expected.keys() & ours.keys():
        assert worst_error(ours[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), SIZES)
def test_outputs_gradients_and_merge_equal_the_dense_method(
    in_features: int, out_features: int, rank: int, options: dict[str, object], direction: str, dtype: torch.dtype
) -> None:
    layer = trained_layer(in_features, out_features, rank, direction=direction, dtype=dtype, **options)
    assert_equal_to_the_dense_method(layer, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), LARGE_SIZES)
def test_large_layers_equal_the_dense_method(
    in_features: int, out_features: int, rank: int, direction: str, dtype: torch.dtype
) -> None:
    options = {"direction": direction, "dtype": dtype, "freeze_base_layer": False, "alpha": 0.7 * rank}
    assert_equal_to_the_dense_method(trained_layer(in_features, out_features, rank, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_of_one_value_has_no_gradient_along_its_direction(direction: str) -> None:
    layer = trained_layer(1, 5, 2, direction=direction, dtype=torch.float64)
    x, grad_output = inputs(layer)
    one_term = DenseDVoRA.of(trained_layer(1, 5, 2, direction=direction, dtype=torch.float64, detach_norm=True))
    ours, terms = gradients(layer, x, grad_output), one_term.gradients(x, grad_output)
    for name in ("lambda_b", "lambda_d"):
        assert ours[name].abs().max() < 1e-12 * terms[name].abs().max()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("freeze_base_layer", [True, False])
def test_zero_rows_equal_the_dense_method(freeze_base_layer: bool, direction: str) -> None:
    layer = trained_layer(
        6, 5, 3, direction=direction, dtype=torch.float64, freeze_base_layer=freeze_base_layer, alpha=2
    )
    with torch.no_grad():
        layer.base_layer.weight[[0, 3]] = 0
    assert_equal_to_the_dense_method(layer, 1e-12)
    assert layer.magnitude.grad[[0, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rank", [4, 40], ids=["rank below the width", "rank above the width"])
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_rows_that_the_update_nearly_cancels_are_exact_to_conditioning(
    ratio: float, rank: int, direction: str, dtype: torch.dtype
) -> None:
    layer = nearly_cancelled(trained_layer(24, 10, rank, direction=direction, dtype=dtype), ratio)
    norm_ratio = DenseDVoRA.of(layer).norm_ratio()
    assert norm_ratio.max() < 3 * ratio, "the rows are not near cancellation"
    # What is left of a row is a difference w / n times smaller than its terms: rounding of the inputs alone moves the
    # result by eps * w / n, in any method.
    tolerance = 40 * torch.finfo(dtype).eps * float(1 / norm_ratio.min())
    assert_equal_to_the_dense_method(layer, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_that_vanishes_altogether_gives_finite_numbers(dtype: torch.dtype) -> None:
    layer = nearly_cancelled(trained_layer(3, 4, 1, dtype=dtype), 0.0)
    x, grad_output = inputs(layer)
    assert layer(x).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(layer, x, grad_output).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_bases_stay_within_their_rounding(direction: str, dtype: torch.dtype) -> None:
    layer = trained_layer(48, 32, 8, direction=direction, dtype=dtype)
    assert_equal_to_the_dense_method(layer, 4 * torch.finfo(dtype).eps)


@given(
    sizes=st.tuples(*[st.integers(2, 12)] * 3),
    tokens=st.integers(1, 5),
    direction=st.sampled_from(DIRECTIONS),
    row_scale=st.sampled_from([1e-2, 1.0, 1e3, 1e6]),
    alpha=st.floats(0.01, 30),
    bias=st.booleans(),
    detach_norm=st.booleans(),
    freeze_base_layer=st.booleans(),
)
def test_any_layer_equals_the_dense_method(
    sizes: tuple[int, int, int], tokens: int, row_scale: float, **options: object
) -> None:
    layer = trained_layer(*sizes, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.base_layer.weight[0] *= row_scale
        layer.magnitude[0] *= row_scale
    assert_equal_to_the_dense_method(layer, 1e-12, tokens)


@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12),
    lambda_b=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    direction=st.sampled_from(DIRECTIONS),
)
def test_any_weight_gives_finite_outputs_and_gradients(
    values: list[float], lambda_b: list[float], direction: str
) -> None:
    layer = trained_layer(3, 4, 2, direction=direction)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(values).view(4, 3))
        layer.magnitude.copy_(1.2 * layer.base_layer.weight.norm(dim=1))
        layer.lambda_b.copy_(torch.tensor(lambda_b))
    x, grad_output = inputs(layer)
    assert layer(x).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(layer, x, grad_output).values())
