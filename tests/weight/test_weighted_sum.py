"""Adapters of one weight combined, against the dense sums."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dvora import SharedProjections
from dvora.method.functional import Vectors
from dvora.weight.adapted_weight import MAGNITUDE_ONLY, AdaptedWeight
from dvora.weight.weighted_sum import SMALLEST_GAIN, WeightedAdapter, interpolated, weighted_sum
from tests.reference import DenseDVoRA

SHARED = SharedProjections(seed=3)
OUT, IN, RANK = 9, 7, 4


def weight(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=dtype)


def adapted(direction: str = "unit", alpha: float | None = None, rank: int = RANK) -> AdaptedWeight:
    return AdaptedWeight(weight(), rank, shared=SHARED, direction=direction, alpha=alpha, name="layer")


def vectors(of: AdaptedWeight, seed: int, lambda_d: torch.Tensor | None = None) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    magnitude, lambda_b, own = of.initial_vectors(0.1)
    magnitude = magnitude * (1 + 0.2 * torch.randn(OUT, generator=generator, dtype=torch.float64))
    lambda_b = torch.randn(OUT, generator=generator, dtype=torch.float64)
    own = own + 0.1 * torch.randn(len(own), generator=generator, dtype=torch.float64)
    return Vectors(magnitude, lambda_b, own if lambda_d is None else lambda_d)


def dense_delta(of: AdaptedWeight, values: Vectors) -> torch.Tensor:
    """`W' - W` from the definition."""
    A, B = SHARED.A(RANK, IN, torch.float64), SHARED.B(RANK, OUT, torch.float64)
    dense = DenseDVoRA(weight(), None, A, B, *values, scaling=of.scaling, direction=of.direction)
    return (dense.merged_weight() - weight()).detach()


@given(
    share=st.floats(-2, 2),
    factor=st.floats(0.1, 3) | st.floats(-3, -0.1),
    directions=st.tuples(*[st.sampled_from(["unit", "weight"])] * 2),
    alpha=st.sampled_from([None, 2.0]),
)
def test_the_sum_is_that_of_the_dense_updates(
    share: float, factor: float, directions: tuple[str, str], alpha: float | None
) -> None:
    first, second = adapted(directions[0]), adapted(directions[1], alpha)
    a = vectors(first, 1)
    b = vectors(second, 2, factor * a.lambda_d)
    gain = 1 + first.factors(a, weight()).gain_minus_one + share * second.factors(b, weight()).gain_minus_one
    assume(bool((gain.abs() > 2 * SMALLEST_GAIN).all()))
    parts = [
        WeightedAdapter(torch.tensor(1.0), a, first),
        WeightedAdapter(torch.tensor(share, dtype=torch.float64), b, second),
    ]
    expected = dense_delta(first, a) + share * dense_delta(second, b)
    found = dense_delta(first, weighted_sum(parts, weight(), first))
    assert torch.allclose(found, expected, atol=1e-9 * float(expected.abs().max()), rtol=1e-9)


def test_one_adapter_can_be_given_any_weight() -> None:
    of = adapted()
    values = vectors(of, 1)
    found = weighted_sum([WeightedAdapter(torch.tensor(0.3, dtype=torch.float64), values, of)], weight(), of)
    assert torch.allclose(dense_delta(of, found), 0.3 * dense_delta(of, values), atol=1e-12)


def test_magnitudes_alone_always_add_up() -> None:
    of, only = adapted(), adapted(rank=MAGNITUDE_ONLY)
    a = vectors(of, 1)
    magnitude, lambda_b, lambda_d = only.initial_vectors(0.1)
    b = Vectors(1.5 * magnitude, lambda_b, lambda_d)
    found = weighted_sum(
        [WeightedAdapter(torch.tensor(1.0), a, of), WeightedAdapter(torch.tensor(1.0), b, only)], weight(), of
    )
    assert torch.allclose(dense_delta(of, found), dense_delta(of, a) + 0.5 * weight(), atol=1e-12)


def test_different_lambda_d_are_refused() -> None:
    of = adapted()
    parts = [WeightedAdapter(torch.tensor(1.0), vectors(of, seed), of) for seed in (1, 2)]
    with pytest.raises(ValueError, match="layer: the adapters have different lambda_d"):
        weighted_sum(parts, weight(), of)


def test_different_ranks_are_refused() -> None:
    small, large = adapted(rank=2), adapted()
    parts = [WeightedAdapter(torch.tensor(1.0), vectors(of, 1), of) for of in (small, large)]
    with pytest.raises(ValueError, match=r"layer: .*rank"):
        weighted_sum(parts, weight(), large)


def test_a_row_without_a_gain_is_refused() -> None:
    of = adapted()
    magnitude, lambda_b, lambda_d = vectors(of, 1)
    silent = Vectors(torch.zeros_like(magnitude), lambda_b, lambda_d)
    # W - W' of a row without gain is W: minus that and W again leave no gain, but a direction.
    parts = [WeightedAdapter(torch.tensor(1.0), vectors(of, 1), of), WeightedAdapter(torch.tensor(1.0), silent, of)]
    kept = weighted_sum(parts[:1], weight(), of)
    g = of.factors(kept, weight()).gain_minus_one + 1
    balanced = Vectors(magnitude * torch.where(torch.arange(OUT) == 0, 1 / g, 1.0), lambda_b, lambda_d)
    with pytest.raises(ValueError, match="some row of the sum has no gain"):
        weighted_sum([WeightedAdapter(torch.tensor(1.0), balanced, of), parts[1]], weight(), of)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_interpolation_ends_exactly_at_its_ends(t: float) -> None:
    of = adapted()
    a, b = vectors(of, 1), vectors(of, 2)
    for found, x, y in zip(interpolated(a, b, t), a, b, strict=True):
        assert torch.allclose(found, (1 - t) * x + t * y, atol=1e-15)
        if t in (0.0, 1.0):
            assert torch.equal(found, y if t else x)
