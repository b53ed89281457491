"""Small questions to PyTorch: which writes are noticed, casts that round no vector, what counts as traced."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from dvora.tensors import TensorVersion, at_least_float32, is_traced, replace_forward
from tests.cases import randn

WRITES: dict[str, tuple[bool, Callable[[Tensor], object]]] = {
    "in place": (True, lambda t: t.mul_(2)),
    "in inference mode": (True, lambda t: torch.inference_mode()(t.mul_)(2)),
    "data assigned": (True, lambda t: setattr(t, "data", randn(3, 4, seed=1))),
    "another place in the same memory": (True, lambda t: setattr(t, "data", t.data.as_strided((3, 4), (4, 1), 12))),
    "other strides": (True, lambda t: setattr(t, "data", t.data.view(4, 3).T)),
    "another dtype": (True, lambda t: setattr(t, "data", t.data.view(torch.int32))),
    "a read": (False, lambda t: t.sum()),
    "data in place": (False, lambda t: t.data.mul_(2)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_version_tells_every_write_that_torch_counts(write: str) -> None:
    noticed, change = WRITES[write]
    tensor = nn.Parameter(randn(2, 3, 4, seed=0)[0], requires_grad=False)
    version = TensorVersion.of(tensor)
    assert version.is_of(tensor.detach())
    change(tensor)
    assert version.is_of(tensor) == (version == TensorVersion.of(tensor)) == (not noticed)


def test_a_version_keeps_no_memory_alive_and_no_other_tensor_gets_it() -> None:
    versions = [TensorVersion.of(randn(6, seed=seed)) for seed in range(50)]
    assert all(first != second for i, first in enumerate(versions) for second in versions[:i])
    assert all(version.storage.expired() for version in versions)


def test_a_tensor_of_inference_mode_has_no_version_that_could_be_trusted() -> None:
    with torch.inference_mode():
        tensor = randn(6, seed=0)
    assert not TensorVersion.of(tensor).is_of(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_guarded_cast_ends_at_float32(dtype: torch.dtype) -> None:
    cast = at_least_float32(lambda t: t.to(dtype) if t.is_floating_point() else t)
    assert cast(torch.ones(2)).dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)
    assert cast(torch.ones(2, dtype=torch.int64)).dtype == torch.int64
    assert at_least_float32(lambda t: t.to("meta", dtype))(torch.ones(2)).is_meta


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode, FakeTensorMode])
def test_what_counts_as_traced(context: Callable[[], AbstractContextManager[object]]) -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_traced())
        return 2 * x

    x = torch.ones(3)
    with context():
        assert is_traced() == (context is FakeTensorMode)
    for transformed in (torch.vmap(look), torch.func.grad(lambda x: look(x).sum()), make_fx(look)):
        transformed(x)
    with forward_ad.dual_level():
        look(x)
    assert seen == [True] * 4
    assert not is_traced()


def test_a_forward_is_given_back_unless_somebody_has_replaced_it_since() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    give_back = replace_forward(layer, torch.zeros_like)
    assert torch.equal(layer(x), torch.zeros_like(x))
    inner = replace_forward(layer, torch.neg)
    give_back()
    assert torch.equal(layer(x), -x)
    inner()
    assert torch.equal(layer(x), torch.zeros_like(x))
    give_back()
    assert "forward" not in vars(layer)
