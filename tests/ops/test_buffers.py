import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad

from tests.cases import randn, trained_layer
from tests.checked import checked

out, scratch = checked("ops.buffers").out, checked("ops.buffers").scratch

CPU = torch.device("cpu")


def address(name: str, values: int, dtype: torch.dtype = torch.float32) -> int:
    return scratch(name, (values,), dtype, CPU).data_ptr()


def test_it_is_the_same_memory_until_more_is_asked_for() -> None:
    first = scratch("same", (4, 6), torch.float32, CPU)
    assert (first.shape, first.dtype) == ((4, 6), torch.float32)
    assert address("same", 24) == address("same", 3) == first.data_ptr()
    larger = scratch("same", (5, 5), torch.float32, CPU)
    assert larger.shape == (5, 5)
    assert address("same", 24) == larger.data_ptr()


def test_names_and_dtypes_have_memory_of_their_own() -> None:
    tensors = [scratch(*of, CPU) for of in [("a", (8,), torch.float32), ("b", (8,), torch.float32)]]
    tensors.append(scratch("a", (8,), torch.float64, CPU))
    assert len({tensor.data_ptr() for tensor in tensors}) == 3


def test_threads_have_memory_of_their_own() -> None:
    # Both are alive at once, so that the second cannot be given the memory of the first.
    barrier = threading.Barrier(2)

    def ask(_: int) -> int:
        found = address("threads", 8)
        barrier.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        assert len({*pool.map(ask, range(2)), address("threads", 8)}) == 3


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked("ops.buffers"), "_LARGEST", 10)
    first, second = [scratch("large", (11,), torch.float32, CPU) for _ in range(2)]
    assert first.data_ptr() != second.data_ptr()


def test_memory_made_in_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        scratch("inference", (8,), torch.float32, CPU)
    kept = scratch("inference", (8,), torch.float32, CPU)
    assert not kept.is_inference()
    assert torch.add(kept.zero_(), 1).sum() == 8


def test_a_graph_or_a_transform_gets_fresh_memory() -> None:
    kept = address("transformed", 8)
    with FakeTensorMode():
        assert scratch("transformed", (8,), torch.float32, CPU).shape == (8,)

    def inside(x: torch.Tensor) -> torch.Tensor:
        assert address("transformed", 8) != kept
        assert out("transformed", (8,), x) is None
        return x

    with torch.no_grad():
        torch.func.vmap(inside)(torch.zeros(2, 8))


def test_nothing_is_written_to_while_operations_are_recorded() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert out("recorded", (2, 3), like) is None
    with torch.no_grad():
        found = out("recorded", (2, 3), like)
    assert found is not None
    assert (found.shape, found.dtype) == ((2, 3), torch.float64)


def test_memory_is_on_its_device_whatever_the_default() -> None:
    with torch.device("meta"):
        made = scratch("default device", (8,), torch.float32, CPU)
    assert made.device == CPU


def test_a_layer_trains_under_another_default_device() -> None:
    layer, x = trained_layer(40, 30, 4), randn(16, 40, seed=0)
    expected = grad(layer(x).sum(), [*layer.vectors])

    def within_and_after() -> list[tuple[torch.Tensor, ...]]:
        with torch.device("meta"):
            within = grad(layer(x).sum(), [*layer.vectors])
        return [within, grad(layer(x).sum(), [*layer.vectors])]

    # A thread of its own, which has no memory yet.
    with ThreadPoolExecutor(1) as pool:
        for found in pool.submit(within_and_after).result():
            assert all(map(torch.equal, found, expected))
