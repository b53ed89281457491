"""Whether a weight is still the one that constants were made from, also where an engine frees and gathers it."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dvora import SharedProjections
from dvora.weight.adapted_weight import AdaptedWeight
from dvora.weight.tensor_state import WeightVersion
from tests.cases import fresh_copy, randn, trained_layer


def gathered_again(weight: Tensor, values: Tensor) -> None:
    """Give a tensor new memory with these values, uncounted, as FSDP2 does when it gathers a parameter."""
    storage, size = weight.untyped_storage(), weight.untyped_storage().size()
    with torch.autograd._unsafe_preserve_version_counter(weight):
        kept = torch.empty(size, dtype=torch.uint8)  # so that the old address is not free
        storage.resize_(0)
        taken = torch.empty(size, dtype=torch.uint8)
        storage.resize_(size)
        weight.copy_(values)
    del kept, taken


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda W: W * 1.02,
    "one value": lambda W: W.index_put((torch.tensor(2), torch.tensor(1)), W[2, 1] + 0.1),
    "signs": lambda W: -W,
    "places": lambda W: W.flip(1),
    "rows": lambda W: W.flip(0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_weight_is_recognised_by_its_values(change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    original = randn(6, 5, seed=0).to(dtype)
    weight = original.clone()
    measured = WeightVersion(weight, gathered_again=True)
    while measured.is_of(weight):
        gathered_again(weight, original)
    assert measured.was_gathered_again(weight)
    assert measured.has_values_of(weight)
    assert measured.is_of(weight)
    changed = change(original.double()).to(dtype)
    while measured.is_of(weight):
        gathered_again(weight, changed)
    assert not measured.has_values_of(weight)


def test_a_counted_change_is_no_gathering() -> None:
    weight = randn(6, 5, seed=0)
    measured = WeightVersion(weight, gathered_again=True)
    weight.mul_(2)
    assert not measured.is_of(weight)
    assert not measured.was_gathered_again(weight)


def test_a_process_with_fsdp2_trusts_no_address() -> None:
    original = randn(6, 5, seed=0)
    weight = original.clone()
    measured = WeightVersion(weight, gathered_again=True)
    assert measured.is_of(weight)

    class Sharded(FSDPModule):
        """What `fully_shard` makes for a type of module."""

    try:
        assert not measured.is_of(weight)
        assert measured.has_values_of(weight)
        with torch.autograd._unsafe_preserve_version_counter(weight):
            weight.mul_(2)
        assert measured.was_gathered_again(weight)
        assert not measured.has_values_of(weight)
    finally:
        del Sharded
        gc.collect()


def test_beside_fsdp2_what_it_has_not_made_is_trusted() -> None:
    layer, x = trained_layer(6, 5, 3).eval(), randn(4, 6, seed=0)

    class Sharded(FSDPModule):
        """What `fully_shard` makes for a type of module."""

    try:
        with torch.no_grad():
            layer(x)
            kept, w = layer.adapted._last._kept, layer.adapted.w
            layer(x)
            assert kept is not None
            assert layer.adapted._last._kept is kept
            layer.base_layer.weight.mul_(2)
            assert torch.equal(layer(x), fresh_copy(layer).eval()(x))
        assert layer.adapted.w is not w
    finally:
        del Sharded
        gc.collect()


def test_constants_are_made_twice_and_then_kept_until_the_values_change() -> None:
    original = randn(6, 5, seed=0)
    weight = original.clone()
    adapted = AdaptedWeight(weight, 3, shared=SharedProjections(0))
    made = []
    for values in [original] * 4 + [2 * original] * 3:
        before = adapted.w
        gathered_again(weight, values)
        adapted.refresh_if_stale(weight)
        made.append(adapted.w is not before)
        assert torch.equal(adapted.w, torch.linalg.vector_norm(values, dim=1))
    assert made == [True, False, False, False, True, False, False]
