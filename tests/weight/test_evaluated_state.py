"""What tells whether a tensor may have changed: its values on a CPU, what PyTorch counts on other devices."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dvora.method.functional import RowFactors
from dvora.weight.tensor_state import EvalCache, TensorVersion, _unchanged
from tests.cases import fresh_copy, randn, trained_layer


def parameter() -> nn.Parameter:
    return nn.Parameter(randn(6, seed=0))


def stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[nn.Parameter], None]:
    def step(tensor: nn.Parameter) -> None:
        tensor.grad = torch.ones_like(tensor)
        make([tensor]).step()

    return step


@torch.no_grad()
def written_through_a_view(tensor: Tensor) -> None:
    tensor[2:4].zero_()


@torch.no_grad()
def written_through_detach(tensor: Tensor) -> None:
    tensor.detach().mul_(2)


def written_in_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(2)


def assigned(tensor: Tensor) -> None:
    tensor.data = randn(6, seed=1)


def assigned_until_the_address_returns(tensor: Tensor) -> None:
    address = tensor.data_ptr()
    for seed in range(100):
        tensor.data = randn(6, seed=seed)
        if tensor.data_ptr() == address:
            break


def assigned_from_one_vector(tensor: nn.Parameter) -> None:
    nn.utils.vector_to_parameters(randn(6, seed=1), [tensor])


def cast(tensor: Tensor) -> None:
    tensor.data = tensor.data.double()


def loaded(tensor: nn.Parameter) -> None:
    holder = nn.ParameterList([tensor])
    holder.load_state_dict({"0": randn(6, seed=1)})


SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    **{f"SGD {k}": stepped(lambda p, k=k: SGD(p, lr=0.1, **{k: True})) for k in ("foreach", "fused")},
    **{f"AdamW {k}": stepped(lambda p, k=k: AdamW(p, lr=0.1, **{k: True})) for k in ("foreach", "fused")},
    "SGD one by one": stepped(lambda p: SGD(p, lr=0.1, foreach=False)),
    "AdamW one by one": stepped(lambda p: AdamW(p, lr=0.1, foreach=False)),
    **{change.__name__: change for change in (written_through_a_view, written_through_detach, loaded, cast)},
    **{change.__name__: change for change in (written_in_inference_mode, assigned, assigned_from_one_vector)},
    "assigned until the address returns": assigned_until_the_address_returns,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_changes_with_the_tensor(change: str) -> None:
    tensor = parameter()
    before = TensorVersion.of(tensor)
    assert TensorVersion.of(tensor) == before
    assert _unchanged(tensor, before)
    CHANGES[change](tensor)
    assert TensorVersion.of(tensor) != before
    assert not _unchanged(tensor, before)


def test_a_state_is_of_one_place_in_memory() -> None:
    memory, tensor = randn(12, seed=0), parameter()
    tensor.data = memory[:6]
    before = TensorVersion.of(tensor)
    tensor.data = memory[6:]
    assert TensorVersion.of(tensor) != before


def test_a_state_is_of_one_dtype() -> None:
    tensor = parameter().to(torch.bfloat16).detach()
    before = TensorVersion.of(tensor)
    tensor.data = tensor.data.view(torch.float16)
    assert TensorVersion.of(tensor) != before


def test_a_state_is_of_one_order_of_the_values() -> None:
    tensor = nn.Parameter(randn(3, 3, seed=0))
    before = TensorVersion.of(tensor)
    tensor.data = tensor.data.T
    assert TensorVersion.of(tensor) != before


def test_tensors_made_one_after_another_in_one_place_have_other_states() -> None:
    states = []
    for seed in range(50):
        tensor = randn(6, seed=seed)
        states.append(TensorVersion.of(tensor))
        del tensor
    assert all(first != second for i, first in enumerate(states) for second in states[:i])


def test_a_state_keeps_no_memory() -> None:
    tensor = randn(6, seed=0)
    state = TensorVersion.of(tensor)
    del tensor
    assert state.storage.expired()


def test_what_is_known_of_a_tensor_of_inference_mode_is_never_trusted() -> None:
    with torch.inference_mode():
        tensor = randn(6, seed=0)
        assert not _unchanged(tensor, TensorVersion.of(tensor))


@pytest.mark.parametrize(
    ("tensor", "same"),
    [
        (torch.ones(3), True),
        (torch.tensor([1.0, 1.0, 2.0]), False),
        (torch.ones(3, dtype=torch.float64), False),
        (torch.ones(4), False),
        (torch.full((3,), torch.nan), False),
        (torch.ones(3, device="meta"), False),
    ],
    ids=["equal", "other", "float64", "longer", "nan", "elsewhere"],
)
def test_values_on_a_cpu_are_compared_themselves(tensor: Tensor, same: bool) -> None:
    assert _unchanged(tensor, torch.ones(3)) == same


def made(log: list[int]) -> Callable[[], RowFactors]:
    """Factors, and a note that they were made."""

    def make(_: object = None) -> RowFactors:
        log.append(1)
        return RowFactors(*torch.zeros(4, 6))

    return make


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factors_are_made_once_for_inputs_that_do_not_change(device: str) -> None:
    last, tensors, log = EvalCache(), [parameter().to(device) for _ in range(3)], []
    first = last.of(tensors, None, made(log))
    assert last.of(tensors, None, made(log)) is first
    assert len(log) == 1


# The meta device stands for those whose values are not looked at.
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("index", range(3))
def test_each_input_that_changes_makes_them_anew(device: str, index: int) -> None:
    last, tensors, log = EvalCache(), [parameter().to(device) for _ in range(3)], []
    for _ in range(2):
        last.of(tensors, None, made(log))
        with torch.no_grad():
            tensors[index].add_(1)
    last.of(tensors, None, made(log))
    assert len(log) == 3


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tensors", [1, 2, 4])
def test_other_inputs_make_them_anew(device: str, tensors: int) -> None:
    last, log, known = EvalCache(), [], [parameter().to(device) for _ in range(4)]
    last.of(known[:3], None, made(log))
    last.of(known[:tensors], None, made(log))
    assert len(log) == 2


def test_another_weight_makes_them_anew() -> None:
    last, log, weights = EvalCache(), [], [parameter() for _ in range(2)]
    for state in (weights[0], weights[0], weights[1], None):
        last.of([parameter()], state, made(log))
    assert len(log) == 3


def test_what_was_dropped_is_made_anew() -> None:
    last, log, tensors = EvalCache(), [], [parameter()]
    last.of(tensors, None, made(log))
    last.drop()
    last.of(tensors, None, made(log))
    assert len(log) == 2


def test_factors_are_neither_part_of_a_graph_nor_of_inference_mode() -> None:
    tensor = parameter()
    with torch.inference_mode():
        factors = EvalCache().of([tensor], None, lambda read: RowFactors(*(read[0] * k for k in range(4))))
    assert not any(factor.is_inference() for factor in factors)
    factors = EvalCache().of([tensor], None, lambda read: RowFactors(*(read[0] * k for k in range(4))))
    assert not any(factor.requires_grad for factor in factors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("which", ["an input", "the weight"])
def test_factors_of_what_is_written_to_meanwhile_are_not_kept(which: str, device: str) -> None:
    last, tensor, weight, log = EvalCache(), parameter().to(device), parameter().to(device), []

    def written_to(_: object) -> RowFactors:
        factors = made(log)()
        with torch.no_grad():
            (tensor if which == "an input" else weight).add_(1)
        return factors

    last.of([tensor], weight, written_to)
    last.of([tensor], weight, made(log))
    assert len(log) == 2


def test_a_weight_of_inference_mode_that_is_written_to_is_followed() -> None:
    with torch.inference_mode():
        layer, x = trained_layer(6, 5, 3).eval(), randn(4, 6, seed=8)
        layer(x)
        layer.base_layer.weight.mul_(randn(5, 6, seed=9))
        assert torch.equal(layer(x), fresh_copy(layer)(x))


def test_a_weight_whose_data_is_its_own_transpose_is_followed() -> None:
    layer, x = trained_layer(6, 6, 3).eval(), randn(4, 6, seed=8)
    with torch.no_grad():
        layer(x)
        layer.base_layer.weight.data = layer.base_layer.weight.data.T
        torch.testing.assert_close(layer(x), fresh_copy(layer)(x))


def test_a_step_does_not_count_as_a_write_to_what_it_leaves_alone() -> None:
    stepped, frozen = parameter(), parameter().requires_grad_(False)
    before = TensorVersion.of(frozen)
    stepped.grad = torch.ones_like(stepped)
    SGD([stepped, frozen], lr=0.1).step()
    assert before.is_of(frozen)
