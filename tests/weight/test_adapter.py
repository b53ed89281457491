"""DVoRAAdapter: identity at the start, inputs of every shape, counts and sizes."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from tests.cases import DIRECTIONS, DTYPES, SHARED, linear, randn, train, trained_layer
from tests.reference import DenseDVoRA


def new_layer(base: nn.Linear, rank: int = 3, **options: object) -> DVoRAAdapter:
    return DVoRAAdapter(base, rank, shared=SHARED, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("freeze_base_layer", [True, False])
def test_at_the_start_the_layer_is_its_base_bit_for_bit(
    freeze_base_layer: bool, bias: bool, direction: str, dtype: torch.dtype
) -> None:
    base = linear(33, 40, bias=bias, dtype=dtype)
    layer = new_layer(base, direction=direction, freeze_base_layer=freeze_base_layer)
    x = randn(50, 33, seed=0, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.merge_to_original_layer().weight, base.weight)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_at_the_start_the_layer_is_its_base_with_every_distribution(distribution: str) -> None:
    base = linear(12, 9)
    layer = DVoRAAdapter(base, 20, shared=SharedProjections(1, distribution))
    x = randn(50, 12, seed=0)
    assert torch.equal(layer(x), base(x))


@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 3),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    zero_rows=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    direction=st.sampled_from(DIRECTIONS),
)
def test_any_layer_is_its_base_at_the_start(
    sizes: tuple[int, int, int], scale: float, zero_rows: bool, dtype: torch.dtype, direction: str
) -> None:
    in_features, out_features, rank = sizes
    base = linear(in_features, out_features, dtype=dtype)
    with torch.no_grad():
        base.weight.mul_(scale)
        base.weight[:: 2 if zero_rows else out_features + 1] = 0
    x = randn(4, in_features, seed=0, dtype=dtype)
    assert torch.equal(new_layer(base, rank, direction=direction)(x), base(x))


def test_a_half_precision_layer_is_its_base_wherever_the_base_is_finite() -> None:
    base = linear(4096, 8, dtype=torch.float16)
    with torch.no_grad():
        base.weight.mul_(0.01)
    x = 1000 * randn(4, 4096, seed=0, dtype=torch.float16)
    assert base(x).isfinite().all()
    assert torch.equal(new_layer(base, 64)(x), base(x))


@given(leading=st.lists(st.integers(0, 3), max_size=4))
def test_inputs_may_have_any_leading_dimensions(leading: list[int]) -> None:
    layer = trained_layer(6, 5, 3)
    x = randn(*leading, 6, seed=0)
    y = layer(x)
    assert y.shape == (*leading, 5)
    torch.testing.assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 6)))


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients() -> None:
    layer = trained_layer(6, 5, 3)
    y = layer(torch.zeros(2, 0, 6))
    y.sum().backward()
    assert y.shape == (2, 0, 5)
    assert not any(vector.grad.any() for vector in layer.vectors)


def test_one_row_gives_what_it_gives_in_a_batch() -> None:
    layer = trained_layer(6, 5, 3)
    x = randn(4, 6, seed=0)
    torch.testing.assert_close(layer(x[2]), layer(x)[2])
    torch.testing.assert_close(layer(x[2:3]), layer(x)[2:3])


def test_inputs_need_not_be_contiguous() -> None:
    layer = trained_layer(6, 5, 3)
    for x in (randn(6, 4, seed=0).T, randn(4, 12, seed=0)[:, ::2], randn(6, seed=0).expand(3, 6)):
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("shape", [(3, 7), (5,), (2, 6, 1), ()])
def test_a_wrong_width_is_refused_with_both_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"width 6 .* got shape {re.escape(str(shape))}"):
        trained_layer(6, 5, 3)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_come_in_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    layer = trained_layer(6, 5, 3, dtype=dtype)
    x = randn(4, 6, seed=0, dtype=dtype)
    assert layer(x).dtype == layer.base_layer(x).dtype == dtype


def test_a_thousand_by_thousand_layer_of_rank_8_trains_2008_values() -> None:
    layer = new_layer(nn.Linear(1000, 1000), 8)
    assert layer.parameter_count == 2008
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2008


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_parameter_count_includes_a_base_that_is_trained(bias: bool) -> None:
    layer = new_layer(linear(6, 5, bias=bias), freeze_base_layer=False)
    assert layer.parameter_count == 13 + 30 + (5 if bias else 0)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == layer.parameter_count


@pytest.mark.parametrize("freeze_base_layer", [True, False])
def test_only_what_is_trained_requires_gradients(freeze_base_layer: bool) -> None:
    layer = new_layer(linear(6, 5), freeze_base_layer=freeze_base_layer)
    assert all(p.requires_grad is not freeze_base_layer for p in layer.base_layer.parameters())
    assert all(vector.requires_grad for vector in layer.vectors)


def test_the_starting_values_are_those_of_the_papers() -> None:
    layer = new_layer(linear(6, 5))
    torch.testing.assert_close(layer.magnitude, layer.base_layer.weight.norm(dim=1))
    assert layer.lambda_b.tolist() == [0] * 5
    assert torch.equal(layer.lambda_d, torch.full((3,), 0.1))


def test_alpha_defaults_to_the_rank() -> None:
    plain, explicit = (train(new_layer(linear(6, 5), alpha=alpha)) for alpha in (None, 3))
    assert plain.alpha == explicit.alpha == 3
    assert torch.equal(plain(torch.ones(6)), explicit(torch.ones(6)))


def test_casting_the_model_leaves_the_vectors_unrounded() -> None:
    layer = trained_layer(6, 5, 3)
    before = layer.get_parameters()
    assert nn.Sequential(layer).to(torch.bfloat16)[0].base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.get_parameters(), before)
    assert torch.equal(layer.half().get_parameters(), before)


def test_diagnostics_equal_those_of_the_dense_matrices() -> None:
    layer = trained_layer(8, 7, 3)
    with torch.no_grad():
        layer.base_layer.weight[3] = 0
    dense = DenseDVoRA.of(layer)
    old, new = dense.weight.detach(), dense.updated_weight().detach()
    live = torch.arange(7) != 3
    ratio, angle = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    ratio[live] = dense.norm_ratio()[live]
    angle[live] = torch.nn.functional.cosine_similarity(old, new)[live].arccos().rad2deg()
    distance = (dense.gain() - 1).abs().detach()
    values = layer.diagnostics()
    assert values == {
        "norm_ratio_mean": pytest.approx(float(ratio.mean()), rel=1e-5),
        "norm_ratio_max": pytest.approx(float(ratio.max()), rel=1e-5),
        "angle_degrees_mean": pytest.approx(float(angle.mean()), rel=1e-5),
        "angle_degrees_max": pytest.approx(float(angle.max()), rel=1e-5),
        "gain_distance_mean": pytest.approx(float(distance.mean()), rel=1e-5),
        "gain_distance_max": pytest.approx(float(distance.max()), rel=1e-5),
        "near_cancellation_share": 0.0,
        "zero_row_share": pytest.approx(1 / 7),
        "constant_bytes": 4 * (7 + 7 * 3),
        "parameter_count": 17,
        "dtype": "torch.float32",
        "base_dtype": "torch.float32",
        "device": "cpu",
    }


def test_diagnostics_count_rows_near_cancellation() -> None:
    layer = DVoRAAdapter(linear(1, 4), 1, shared=SHARED)
    with torch.no_grad():
        update = layer.lambda_d * SHARED.B(1, 4)[:, 0] * SHARED.A(1, 1)[0, 0]
        layer.lambda_b[0] = -0.98 * layer.base_layer.weight[0, 0].sign() / update[0]
    assert layer.diagnostics()["near_cancellation_share"] == 0.25


def test_diagnostics_of_an_untrained_layer_show_no_change() -> None:
    values = new_layer(linear(6, 5)).diagnostics()
    assert values["norm_ratio_max"] == 1
    assert values["angle_degrees_max"] == values["gain_distance_max"] == 0


def test_the_printed_form_names_what_the_layer_is() -> None:
    text = repr(new_layer(linear(6, 5), alpha=2))
    for part in ("trained=13, freeze_base_layer=True", "rank=3, alpha=2, direction='unit'", "Linear(in_features=6"):
        assert part in text
