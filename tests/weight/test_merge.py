"""Merging a delta into a weight of any dtype, and the share of it that rounding swallows."""

import warnings

import pytest
import torch

from dvora.weight.merge import SMALL_LOSS, MergePrecisionWarning, merge, warn_of_losses
from tests.cases import randn


def test_a_merge_into_float32_loses_next_to_nothing() -> None:
    weight, delta = randn(5, 6, seed=0), randn(5, 6, seed=1)
    merged = merge(weight, delta)
    assert torch.equal(merged.weight, weight + delta)
    assert merged.lost < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_the_share_of_the_delta_that_the_merged_weight_lacks(dtype: torch.dtype) -> None:
    weight, delta = randn(50, 60, seed=0, dtype=dtype), 1e-3 * randn(50, 60, seed=1)
    merged = merge(weight, delta)
    arrived = merged.weight.double() - weight.double()
    expected = float((arrived - delta.double()).norm() / delta.double().norm())
    assert merged.weight.dtype == dtype
    assert merged.lost == pytest.approx(expected, rel=1e-3)


def test_a_delta_below_the_rounding_of_the_weight_is_lost_whole() -> None:
    merged = merge(torch.ones(4, 4, dtype=torch.bfloat16), torch.full((4, 4), 1e-4))
    assert torch.equal(merged.weight, torch.ones(4, 4, dtype=torch.bfloat16))
    assert merged.lost == pytest.approx(1, rel=1e-3)


def test_a_zero_delta_loses_nothing_and_changes_no_bit() -> None:
    weight = randn(5, 6, seed=0, dtype=torch.bfloat16)
    merged = merge(weight, torch.zeros(5, 6))
    assert torch.equal(merged.weight, weight)
    assert merged.lost == 0


def test_a_merge_leaves_the_weight_alone() -> None:
    weight = randn(5, 6, seed=0)
    merged = merge(weight, randn(5, 6, seed=1)).weight
    merged.zero_()
    assert torch.equal(weight, randn(5, 6, seed=0))


def test_a_merge_has_no_graph() -> None:
    assert not merge(randn(5, 6, seed=0).requires_grad_(), randn(5, 6, seed=1)).weight.requires_grad


def test_small_losses_are_not_worth_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_losses({"first": SMALL_LOSS, "second": 0.0}, torch.bfloat16)
        warn_of_losses({}, torch.bfloat16)


def test_one_warning_counts_the_layers_and_names_the_worst() -> None:
    with pytest.warns(MergePrecisionWarning) as caught:
        warn_of_losses({"a": 0.2, "b": 0.416, "c": 0.01}, torch.bfloat16)
    assert len(caught) == 1
    for part in ("torch.bfloat16", "2 of 3 layers", "most in b: 41.6%"):
        assert part in str(caught[0].message)


def test_the_warning_can_be_made_an_error_by_its_class() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MergePrecisionWarning)
        with pytest.raises(MergePrecisionWarning):
            warn_of_losses({"a": 1.0}, torch.float16)
