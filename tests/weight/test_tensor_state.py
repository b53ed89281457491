"""Detecting changes of a tensor: by PyTorch's counters, by identity, by samples in FSDP2."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dvora import SharedProjections
from dvora.weight.adapted_weight import AdaptedWeight
from dvora.weight.tensor_state import SameTensor, TensorVersion, WeightVersion
from tests.cached_layers import CHANGES, UNCOUNTED, Subject, plain
from tests.cases import fresh_copy, randn, trained_layer


def parameter() -> nn.Parameter:
    return nn.Parameter(randn(6, seed=0))


def tensors(subject: Subject) -> list[Tensor]:
    return [*subject.vectors, subject.base.weight, subject.x]


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"detached inputs"}))
def test_a_version_tells_every_change_that_torch_counts(change: str) -> None:
    subject = plain()
    versions = [TensorVersion.of(tensor) for tensor in tensors(subject)]
    assert all(version.is_of(tensor) for version, tensor in zip(versions, tensors(subject), strict=True))
    CHANGES[change](subject)
    same = [version.is_of(tensor) for version, tensor in zip(versions, tensors(subject), strict=True)]
    equal = [version == TensorVersion.of(tensor) for version, tensor in zip(versions, tensors(subject), strict=True)]
    assert same == equal
    assert all(same) == (change in {*UNCOUNTED, "a view with the same values"})


@pytest.mark.parametrize("change", CHANGES)
def test_the_quick_check_tells_at_least_the_changes_that_a_version_tells(change: str) -> None:
    subject = plain()
    before, held = tensors(subject), [tensor.detach() for tensor in tensors(subject)]
    versions, known = [TensorVersion.of(tensor) for tensor in before], [SameTensor(tensor) for tensor in before]
    assert all(map(SameTensor.is_of, known, before))
    CHANGES[change](subject)
    now = tensors(subject)
    same = list(map(SameTensor.is_of, known, now))
    of_version = list(map(TensorVersion.is_of, versions, now))
    identical = [first is second for first, second in zip(before, now, strict=True)]
    assert same == [a and b for a, b in zip(of_version, identical, strict=True)]
    assert list(map(SameTensor.is_same, known, now)) == identical
    assert len(held) == len(now)  # no freed memory that another storage could get


def assigned_until_the_address_returns(tensor: Tensor) -> None:
    address = tensor.data_ptr()
    for seed in range(100):
        tensor.data = randn(6, seed=seed)
        if tensor.data_ptr() == address:
            break


def test_a_version_is_of_one_storage_place_dtype_and_order() -> None:
    memory, tensor = randn(18, seed=0), parameter()
    before, known = TensorVersion.of(tensor), SameTensor(tensor)
    assigned_until_the_address_returns(tensor)
    assert not before.is_of(tensor)
    assert not known.is_of(tensor)
    for first, second in [
        (memory[:6], memory[6:12]),
        (memory[:9].view(3, 3), memory[:9].view(3, 3).T),
        (memory.to(torch.bfloat16), memory.to(torch.bfloat16).view(torch.float16)),
    ]:
        tensor.data = first
        before, known = TensorVersion.of(tensor), SameTensor(tensor)
        tensor.data = second if second.dtype == first.dtype else first.view(torch.float16)
        assert not before.is_of(tensor)
        assert not known.is_of(tensor)


def test_a_tensor_whose_values_are_one_value_of_its_own_memory_is_another() -> None:
    tensor = parameter()
    known = SameTensor(tensor)
    tensor.data = tensor.data[:1].expand(6)
    assert not known.is_of(tensor)


def test_the_quick_check_keeps_no_tensor_and_no_memory_alive() -> None:
    tensor = parameter()
    known, memory = SameTensor(tensor), TensorVersion.of(tensor).storage
    del tensor
    assert memory.expired()
    assert not known.is_of(parameter())


def test_tensors_made_one_after_another_in_one_place_have_other_versions_that_keep_no_memory() -> None:
    versions = []
    for seed in range(50):
        tensor = randn(6, seed=seed)
        versions.append(TensorVersion.of(tensor))
        del tensor
    assert all(first != second for i, first in enumerate(versions) for second in versions[:i])
    assert all(version.storage.expired() for version in versions)


def test_a_tensor_of_inference_mode_has_no_version_that_could_be_trusted() -> None:
    with torch.inference_mode():
        tensor = randn(6, seed=0)
        assert not TensorVersion.of(tensor).is_of(tensor)
        assert not SameTensor(tensor).is_of(tensor)


def test_a_step_does_not_count_as_a_write_to_what_it_leaves_alone() -> None:
    stepped, frozen = parameter(), parameter().requires_grad_(False)
    before, known = TensorVersion.of(frozen), SameTensor(frozen)
    stepped.grad = torch.ones_like(stepped)
    torch.optim.SGD([stepped, frozen], lr=0.1).step()
    assert before.is_of(frozen)
    assert known.is_of(frozen)


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


OTHER_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda W: W * 1.02,
    "one value": lambda W: W.index_put((torch.tensor(2), torch.tensor(1)), W[2, 1] + 0.1),
    "signs": lambda W: -W,
    "places": lambda W: W.flip(1),
    "rows": lambda W: W.flip(0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", OTHER_VALUES)
def test_a_weight_that_was_gathered_again_is_recognised_by_its_values(change: str, dtype: torch.dtype) -> None:
    original = randn(6, 5, seed=0).to(dtype)
    weight = original.clone()
    version = WeightVersion(weight, gathered_again=True)
    while version.is_of(weight):
        gathered_again(weight, original)
    assert version.was_gathered_again(weight)
    assert version.has_values_of(weight)
    assert version.is_of(weight)
    changed = OTHER_VALUES[change](original.double()).to(dtype)
    while version.is_of(weight):
        gathered_again(weight, changed)
    assert not version.has_values_of(weight)


def test_a_counted_change_is_no_gathering() -> None:
    weight = randn(6, 5, seed=0)
    version = WeightVersion(weight, gathered_again=True)
    weight.mul_(2)
    assert not version.is_of(weight)
    assert not version.was_gathered_again(weight)


@pytest.fixture
def fsdp2() -> Iterator[None]:
    """A process in which FSDP2 has wrapped some module."""

    class Sharded(FSDPModule):
        """What `fully_shard` makes for a type of module."""

    yield
    del Sharded
    gc.collect()


@pytest.mark.usefixtures("fsdp2")
def test_a_process_with_fsdp2_trusts_no_address() -> None:
    weight = randn(6, 5, seed=0)
    version = WeightVersion(weight, gathered_again=True)
    assert not version.is_of(weight)
    assert not SameTensor(weight).is_of(weight)
    assert version.has_values_of(weight)
    with torch.autograd._unsafe_preserve_version_counter(weight):
        weight.mul_(2)
    assert version.was_gathered_again(weight)
    assert not version.has_values_of(weight)


@pytest.mark.usefixtures("fsdp2")
def test_beside_fsdp2_what_it_has_not_made_is_trusted() -> None:
    layer, x = trained_layer(6, 5, 3).eval(), randn(4, 6, seed=0)
    with torch.no_grad():
        layer(x)
        kept, w = layer.adapted.kept.evaluated, layer.adapted.w
        layer(x)
        assert kept is not None
        assert layer.adapted.kept.evaluated is kept
        layer.base_layer.weight.mul_(2)
        assert torch.equal(layer(x), fresh_copy(layer).eval()(x))
    assert layer.adapted.w is not w


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
