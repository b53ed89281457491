"""Outputs of layers that follow a plan, against the dense method in float64, for all inputs and after all changes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig, SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.ops.passes import current_pass
from dvora.tuner import DVoRALayer
from tests.cached_layers import Siblings
from tests.cases import DIRECTIONS, DTYPES, linear, randn
from tests.tuner.dense import dense_layer
from tests.tuner.tiny import dvora_layers, train_vectors
from tests.tuner.towers import adapted, alone, evaluated, in_the_middle, layer_of
from tests.weight.planned import close, followed, watched, with_plans

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Beside the largest sum of the absolute values that are added up."""
OUTS = (5, 12)


def siblings(in_features: int, dtype: torch.dtype, bias: bool, **settings: object) -> PeftModel:
    """Two layers of the same inputs, in evaluation."""
    layers: list[nn.Module] = [linear(in_features, out, bias=bias, dtype=dtype) for out in OUTS]
    model = get_peft_model(Siblings(layers), DVoRAConfig(target_modules=["0", "1"], **settings)).eval()
    train_vectors(model)
    return model


def laid_out(leading: list[int], size: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Inputs of some layout in memory."""
    if layout == "every second value":
        return randn(*leading, 2 * size, seed=1, dtype=dtype)[..., ::2]
    if layout == "features first":
        return randn(size, *leading, seed=1, dtype=dtype).movedim(0, -1)
    if layout == "one token, repeated":
        return randn(size, seed=1, dtype=dtype).expand(*leading, size)
    return randn(*leading, size, seed=1, dtype=dtype)


def expected(model: PeftModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs by the definition, and the sums of the absolute values that are added up in them."""
    outputs, sizes = [], []
    for _, layer in dvora_layers(model):
        dense = dense_layer(layer, model, "default")
        with torch.no_grad():
            update = dense.scale().abs()[:, None] * (dense.B * dense.lambda_d).abs() @ dense.A.abs()
            added_up = dense.gain().abs()[:, None] * dense.weight.abs() + update
            bias = 0 if dense.bias is None else (1 + dense.gain().abs()) * dense.bias.abs()
            outputs.append(dense(x))
            sizes.append(x.double().abs() @ added_up.T + bias)
    return torch.cat(outputs, -1), torch.cat(sizes, -1)


@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    in_features=st.integers(1, 14),
    rank=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    leading=st.lists(st.integers(1, 4), max_size=3),
    layout=st.sampled_from(["contiguous", "every second value", "features first", "one token, repeated"]),
    share_inputs=st.booleans(),
)
@example("kaiming_uniform", 6, 3, torch.float32, True, "unit", [], "contiguous", True)
@example("structured", 12, 7, torch.float32, True, "unit", [1, 1], "contiguous", True)  # no r1 r2 = 7
@example("structured", 6, 30, torch.float32, False, "unit", [1], "contiguous", True)  # several blocks
@example("structured", 6, 3, torch.float32, False, "unit", [], "contiguous", False)
@example("kaiming_uniform", 6, 1, torch.float64, True, "unit", [3, 4], "features first", True)  # many tokens
@example("structured", 6, 3, torch.bfloat16, True, "weight", [], "every second value", True)
def test_planned_outputs_are_those_of_the_definition(
    distribution: str,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    bias: bool,
    direction: str,
    leading: list[int],
    layout: str,
    share_inputs: bool,
) -> None:
    model = siblings(in_features, dtype, bias, r=rank, projection_init=distribution, direction=direction)
    for _, layer in dvora_layers(model):
        layer.adapted("default").shared.share_inputs = share_inputs
    x = laid_out(leading, in_features, dtype, layout)
    (reference, sizes), before = expected(model, x), x.clone()
    for passed in range(3):
        with watched() as ways:
            found = evaluated(model, x)
        assert found.dtype == dtype
        assert found.shape == reference.shape
        assert (found.double() - reference).abs().max() <= TOLERANCE[dtype] * sizes.max()
        small = any(layer.adapted("default").small is not None for _, layer in dvora_layers(model))
        assert small or ways.followed == (2 if passed else 0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_made_with_one_shape_of_inputs_serves_all(dtype: torch.dtype, distribution: str) -> None:
    model = siblings(6, dtype, True, r=3, projection_init=distribution)
    for shape in [(1, 6), (4, 6), (6,), (2, 3, 6), (1, 1, 6), (70, 6), (0, 6), (1, 6)]:
        x = randn(*shape, seed=2, dtype=dtype)
        reference, sizes = expected(model, x)
        found = evaluated(model, x)
        assert found.shape == reference.shape
        assert not found.numel() or (found.double() - reference).abs().max() <= TOLERANCE[dtype] * sizes.max()
    assert followed(model, x) == 2


@pytest.mark.parametrize("share_inputs", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_planned_layers_share_what_they_may(rows: int, share_inputs: bool) -> None:
    model, x = siblings(6, torch.float32, True, r=3), randn(rows, 6, seed=2)
    (shared,) = {layer.adapted("default").shared for _, layer in dvora_layers(model)}
    for change in (True, share_inputs):  # it may be switched between passes
        shared.share_inputs = change
        evaluated(model, x)
        evaluated(model, x)
    made: list[object] = []
    for _, layer in dvora_layers(model):
        layer.register_forward_hook(lambda *_: made.append(shared_in_pass()))
    assert followed(model, x) == 2
    assert (made[0] is made[1] is not None) == share_inputs
    assert close(evaluated(model, x).double(), expected(model, x)[0])


def shared_in_pass() -> object:
    """The projection that the layers of this pass share."""
    running = current_pass()
    return None if running is None or running.projected is None else running.projected.z


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (5, 8, 6)])
def test_base_outputs_of_any_layout_and_dtype_are_taken(
    shape: tuple[int, ...], transposed: bool, distribution: str
) -> None:
    model, x = siblings(6, torch.float32, True, r=3, projection_init=distribution), randn(*shape, seed=2)
    (reference, _), dtype = expected(model, x), torch.float32
    for _, layer in dvora_layers(model):
        layer.base_layer.register_forward_hook(lambda _, __, y: (y.mT.contiguous().mT if transposed else y).to(dtype))
    for dtype in (torch.float32, torch.float16, torch.float32, torch.float64):  # the hook reads it
        for _ in range(3):
            found = evaluated(model, x)
            torch.testing.assert_close(found.double(), reference, rtol=0.01, atol=0.02)
        assert found.dtype == dtype
        assert followed(model, x) == 2


# Everything that a plan depends on, changed after plans were made.


def other(values: Tensor, seed: int = 9) -> Tensor:
    return values.detach() * (1.3 + 0.4 * randn(*values.shape, seed=seed, dtype=values.dtype).tanh())


def vector(index: int, write: Callable[[nn.Parameter], object]) -> Callable[[DVoRALayer], None]:
    return torch.no_grad()(lambda layer: write(layer.vectors("default")[index]))


def replaced(index: int) -> Callable[[DVoRALayer], None]:
    def change(layer: DVoRALayer) -> None:
        vectors = layer.vector_dicts()[index]
        vectors["default"] = nn.Parameter(other(vectors["default"]))

    return change


def of_bias(write: Callable[[Tensor], object]) -> Callable[[DVoRALayer], None]:
    return torch.no_grad()(lambda layer: write(layer.base_layer.bias))


def of_weight(write: Callable[[Tensor], object]) -> Callable[[DVoRALayer], None]:
    return torch.no_grad()(lambda layer: write(layer.base_layer.weight))


def set_base(layer: DVoRALayer, name: str, value: Tensor | None) -> None:
    setattr(layer.base_layer, name, None if value is None else nn.Parameter(value, requires_grad=False))


def base_of_the_same_weight(layer: DVoRALayer) -> None:
    base = nn.Linear(8, 8)
    base.weight, base.bias = layer.base_layer.weight, nn.Parameter(randn(8, seed=4), requires_grad=False)
    layer.base_layer = base


def other_matrices(layer: DVoRALayer) -> None:
    adapted = layer.adapted("default")
    adapted.dvora_projections = SharedProjections(99, adapted.shared.distribution)
    adapted.refresh(layer.base_layer.weight)


def second(layer: DVoRALayer) -> None:
    layer.set_adapter(["second"])


def second_replaces_first(layer: DVoRALayer) -> None:
    second(layer)
    layer.delete_adapter("default")


CHANGES: dict[str, Callable[[DVoRALayer], object]] = {
    **{f"vector {index}": vector(index, lambda v: v.copy_(other(v))) for index in range(3)},
    **{f"vector {index}, its data": vector(index, lambda v: setattr(v, "data", other(v))) for index in range(3)},
    **{f"vector {index} replaced": replaced(index) for index in range(3)},
    "strength": lambda layer: layer.set_strength("default", 0.3),
    "strength in place": lambda layer: layer.strength("default").fill_(-0.5),
    "weight": of_weight(lambda w: w.copy_(other(w))),
    "weight, its data": of_weight(lambda w: setattr(w, "data", other(w))),
    "weight turned in its place": of_weight(lambda w: setattr(w, "data", w.data.T)),
    "weight replaced": lambda layer: set_base(layer, "weight", other(layer.base_layer.weight)),
    "bias": of_bias(lambda bias: bias.copy_(other(bias))),
    "bias, its data": of_bias(lambda bias: setattr(bias, "data", other(bias))),
    "bias, its data in place": of_bias(lambda bias: bias.data.mul_(1.5)),
    "bias replaced": lambda layer: set_base(layer, "bias", other(layer.base_layer.bias)),
    "bias removed": lambda layer: set_base(layer, "bias", None),
    "bias far above the rows": of_bias(lambda bias: bias.copy_(1e3 * torch.ones(8))),
    "bias as no parameter": lambda layer: (
        delattr(layer.base_layer, "bias"),
        setattr(layer.base_layer, "bias", randn(8, seed=5)),
    ),
    "a base of the same weight": base_of_the_same_weight,
    "other matrices": other_matrices,
    "the other adapter": second,
    "the other adapter, this one deleted": second_replaces_first,
    "both adapters": lambda layer: layer.set_adapter(["default", "second"]),
    "no adapter": lambda layer: layer.set_adapter([]),
    "disabled": lambda layer: layer.enable_adapters(False),
    "the other one merged": lambda layer: layer.merge(adapter_names=["second"]),
    "merged and unmerged, trained": lambda layer: (layer.merge(), layer.unmerge(), CHANGES["vector 1"](layer)),
}
LEFT = ["bias as no parameter", "bias far above the rows", "both adapters", "no adapter", "disabled"]
FOLLOWED = dict.fromkeys([*LEFT, "the other one merged"], 3)
"""How many layers follow a plan in later passes, where not all four do."""
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@every_distribution
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_passes_is_followed(change: str, distribution: str) -> None:
    model = with_plans(adapted(("default", "second"), projection_init=distribution))
    before = evaluated(model)
    CHANGES[change](layer_of(model))
    reference = evaluated(alone(model))
    for _ in range(3):
        assert torch.allclose(evaluated(model), reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max() + 1))
    assert not close(before, reference)
    assert followed(model) == FOLLOWED.get(change, 4)


# No write that is not counted is expected within a pass.
@every_distribution
@pytest.mark.parametrize("change", [change for change in CHANGES if change != "bias, its data in place"])
def test_a_change_between_the_beginning_of_a_pass_and_the_layer_is_followed(change: str, distribution: str) -> None:
    model = with_plans(adapted(("default", "second"), projection_init=distribution))
    before = evaluated(model)
    with in_the_middle(model, lambda of: CHANGES[change](layer_of(of))):
        found = evaluated(model)
    reference = evaluated(alone(model))
    tolerance = 1e-6 * float(reference.abs().max() + 1)
    assert torch.allclose(found, reference, rtol=1e-5, atol=tolerance)
    assert torch.allclose(evaluated(model), reference, rtol=1e-5, atol=tolerance)
    assert not close(before, reference)


UNCOUNTED: dict[str, Callable[[Tensor], object]] = {
    "data in place": lambda v: v.data.mul_(1.4),
    "NumPy": lambda v: v.detach().numpy().fill(0.3),
    "data assigned": lambda v: setattr(v, "data", 1.4 * v.data),
}


@every_distribution
@pytest.mark.parametrize("write", UNCOUNTED)
@pytest.mark.parametrize("index", range(3))
def test_a_write_between_passes_that_is_not_counted_is_followed(index: int, write: str, distribution: str) -> None:
    model = with_plans(adapted(projection_init=distribution))
    for name in ("lin0", "lin3"):
        before = evaluated(model)
        UNCOUNTED[write](layer_of(model, name).vectors("default")[index])
        assert close(evaluated(model), evaluated(alone(model)))
        assert close(evaluated(model), evaluated(alone(model)))
        assert not close(evaluated(model), before)


@every_distribution
@pytest.mark.parametrize("index", range(3))
def test_a_vector_that_is_replaced_by_its_twin_is_followed(index: int, distribution: str) -> None:
    # The optimizer still holds the old one, which keeps the values that the factors were made from.
    model = with_plans(adapted(projection_init=distribution))
    vectors = layer_of(model).vector_dicts()[index]
    old = vectors["default"]
    vectors["default"] = nn.Parameter(old.detach().clone())
    for _ in range(3):
        assert close(evaluated(model), evaluated(alone(model)))
    vectors["default"].data.mul_(2)
    for _ in range(3):
        assert close(evaluated(model), evaluated(alone(model)))
    vectors["default"] = old
    assert close(evaluated(model), evaluated(alone(model)))


@every_distribution
def test_a_strength_that_is_followed_and_back(distribution: str) -> None:
    model = with_plans(adapted(projection_init=distribution))
    for strength in (0.3, 1.0, -2.0, 0.0, 1.0):
        layer_of(model).set_strength("default", strength)
        for _ in range(2):
            assert close(evaluated(model), evaluated(alone(model)))
    layer_of(model).set_strength("default", 0.3)
    evaluated(model)
    layer_of(model).strength("default").data.fill_(0.6)
    assert close(evaluated(model), evaluated(alone(model)))


def test_a_layer_that_is_called_twice_in_a_pass_follows_what_it_found_the_first_time() -> None:
    model = adapted().eval()
    layer = layer_of(model)
    layer.set_strength("default", 0.3)
    model.get_base_model().lin2 = model.get_base_model().lin3
    for calls in (1, 4, 4):
        with watched() as ways:
            found = evaluated(model)
        assert ways.followed == calls
        assert close(found, evaluated(alone(model)))


def test_a_base_without_a_place_for_a_bias_is_no_error() -> None:
    model, x = siblings(6, torch.float32, False, r=3), randn(4, 6, seed=2)
    with_plans(model, x)
    for bias in (randn(OUTS[0], seed=3), None):
        _, layer = next(dvora_layers(model))
        layer.base_layer._parameters.pop("bias", None)
        layer.base_layer.bias = bias
        for _ in range(3):
            assert close(evaluated(model, x), evaluated(alone(model), x))
        assert followed(model, x) == 1


@pytest.mark.parametrize("index", range(3))
def test_a_vector_that_an_engine_keeps_elsewhere_is_followed(index: int) -> None:
    # As FSDP does with its views of parameters.
    model = with_plans(adapted())
    vectors = layer_of(model).vector_dicts()[index]
    vectors.__dict__["default"] = other(vectors._parameters.pop("default"))
    for _ in range(3):
        assert close(evaluated(model), evaluated(alone(model)))
    assert followed(model) == 3
    vectors.__dict__["default"].data.mul_(2)
    assert close(evaluated(model), evaluated(alone(model)))


def test_an_adapter_that_its_base_switches_off_is_no_error() -> None:
    model = adapted(("default", "second")).eval()
    layer = layer_of(model)
    expected_outputs = evaluated(alone(model))
    for names in ([], ["second"]):
        handle = layer.base_layer.register_forward_hook(lambda *_, names=names: layer.set_adapter(names))
        for _ in range(2):
            layer.set_adapter(["default"])
            assert close(evaluated(model), expected_outputs)
        handle.remove()
        assert close(evaluated(model), evaluated(alone(model)))
