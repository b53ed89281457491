"""Evaluations of whole models: factors are kept from pass to pass, vectors are compared once a pass and all together.

Whatever is changed between two passes, the next one answers as a model that was made with those values, and so do
layers that are called by themselves.
"""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import dvora
from dvora.ops.passes import current_pass
from dvora.weight import factors
from dvora.weight.factor_pass import add_factor_pass
from tests.cached_layers import CHANGES_OF_LAYERS, SAME_VALUES, Subject, in_peft, other, plain
from tests.cases import COPIES
from tests.tuner.layer_cases import CASES
from tests.tuner.subjects import Subject as LayerType
from tests.tuner.tiny import train_vectors
from tests.tuner.towers import CHANGED, adapted, alone, calls, evaluated, inner, inputs, layer_of, trained

__all__ = ["calls"]
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def plain_model() -> Subject:
    """Layers of plain PyTorch in a model whose passes are known."""
    subject = plain()
    add_factor_pass(subject.model)
    return subject


def passed(subject: Subject, mode: Callable[[], object] = torch.no_grad) -> Tensor:
    """The outputs of a pass of the whole model."""
    with mode():
        return subject.model(subject.x.to(subject.base.weight.dtype))


@pytest.mark.parametrize("change", CHANGES_OF_LAYERS)
@pytest.mark.parametrize("make", [plain_model, in_peft])
def test_no_pass_of_a_model_is_stale(make: Callable[[], Subject], change: str) -> None:
    for mode in MODES:
        subject = make()
        before = [passed(subject, mode) for _ in range(3)]
        CHANGES_OF_LAYERS[change](subject)
        expected = passed(subject.anew())
        torch.testing.assert_close(passed(subject, mode), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(passed(subject, torch.no_grad), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(subject.evaluated(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(before[1], before[2])
        assert torch.equal(before[0].to(expected.dtype), expected) == (change in SAME_VALUES)


UNCOUNTED: dict[str, Callable[[Tensor], object]] = {
    "data in place": lambda v: v.data.mul_(1.4),
    "data assigned": lambda v: setattr(v, "data", 1.4 * v.data),
    "NumPy": lambda v: v.detach().numpy().fill(v.detach().numpy()[0] + 0.3),
    "one value": lambda v: v.data[1:2].add_(0.3),
    "a sign": lambda v: v.data[:1].neg_(),
}


@pytest.mark.parametrize("write", UNCOUNTED)
@pytest.mark.parametrize("name", ["lin0", CHANGED])
@pytest.mark.parametrize("index", range(3))
def test_a_write_that_is_not_counted_is_found_once_a_pass(write: str, name: str, index: int) -> None:
    model = adapted().eval()
    for passes in (1, 3):
        for _ in range(passes):
            evaluated(model)
        vector = layer_of(model, name).vectors("default")[index]
        for _ in range(2):
            UNCOUNTED[write](vector)
            torch.testing.assert_close(evaluated(model), evaluated(alone(model)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("write", UNCOUNTED)
def test_a_layer_that_is_called_by_itself_compares_every_time(write: str) -> None:
    model, x = adapted().eval(), inputs()
    for _ in range(3):
        evaluated(model)
        before = evaluated(layer_of(model), x)
        UNCOUNTED[write](layer_of(model).vectors("default").lambda_b)
        found = evaluated(layer_of(model), x)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, evaluated(layer_of(alone(model)), x), rtol=1e-5, atol=1e-6)


def test_vectors_of_all_layers_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compared = adapted().eval(), Counter()
    have_values = factors.have_values
    monkeypatch.setattr(factors, "have_values", lambda *pair: compared.update(["one"]) or have_values(*pair))
    for _ in range(4):
        compared.clear()
        evaluated(model)
    assert not compared
    layer_of(model).vectors("default").lambda_b.data.mul_(2)
    evaluated(model)
    assert compared


def test_a_twin_of_a_vector_does_not_vouch_for_it() -> None:
    # The optimizer still holds the old vector, which has the values that the entry was made from.
    model, x = adapted().eval(), inputs()
    evaluated(model)
    evaluated(model)
    vectors = layer_of(model).dvora_lambda_b
    old = vectors["default"]
    vectors["default"] = nn.Parameter(old.detach().clone())
    load_base(model)  # so that an entry of the new one is made
    evaluated(layer_of(model), x)
    vectors["default"].data.mul_(2)
    torch.testing.assert_close(evaluated(model), evaluated(alone(model)), rtol=1e-5, atol=1e-6)
    assert old.shape == (8,)


class Uncounted(torch.optim.Optimizer):
    """As engines do it: a step that PyTorch's counters do not see."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-0.1)


def by_hand(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.data.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize(
    "step",
    [by_hand, lambda p: Uncounted(p).step(), lambda p: torch.optim.AdamW(p, 0.1, fused=True).step()],
    ids=["no optimizer", "an optimizer that counts nothing", "fused"],
)
def test_steps_between_evaluations_are_followed(step: Callable[[list[nn.Parameter]], object]) -> None:
    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for evaluate_between in (True, False, True, True):
        trained(model)
        if evaluate_between:
            evaluated(model)
        step(parameters)
        torch.testing.assert_close(evaluated(model), evaluated(alone(model)), rtol=1e-5, atol=1e-6)
        assert trained(model).differ(trained(alone(model))) < 1e-5


def load_state(model: PeftModel) -> None:
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({n: other(v) if n in names else v for n, v in model.state_dict().items()})


def load_adapter_state(model: PeftModel) -> None:
    set_peft_model_state_dict(model, {n: other(v) for n, v in get_peft_model_state_dict(model).items()})


def load_base(model: PeftModel) -> None:
    layer_of(model).base_layer.load_state_dict({"weight": torch.eye(8), "bias": torch.ones(8)})


def second_and_back(model: PeftModel) -> None:
    model.set_adapter("second")
    evaluated(model)
    UNCOUNTED["data in place"](layer_of(model).vectors("default").magnitude)
    model.set_adapter("default")


def delete_first(model: PeftModel) -> None:
    model.set_adapter("second")
    model.delete_adapter("default")


def merge_there_and_back(model: PeftModel) -> None:
    model.merge_adapter()
    evaluated(model)
    model.unmerge_adapter()
    train_vectors(model, seed=8)


def disable_for_a_while(model: PeftModel) -> None:
    with model.disable_adapter():
        evaluated(model)
        UNCOUNTED["data in place"](layer_of(model).vectors("default").lambda_d)


OPERATIONS: dict[str, Callable[[PeftModel], object]] = {
    **{f.__name__: f for f in (load_state, load_adapter_state, load_base, second_and_back, delete_first)},
    **{f.__name__: f for f in (merge_there_and_back, disable_for_a_while)},
    "strength": lambda model: model.set_strength(0.3),
    "strength of one layer": lambda model: model.set_strength({CHANGED: -0.5}),
    "strength twice": lambda model: (model.set_strength(0.3), evaluated(model), model.set_strength(0.7)),
    "strength there and back": lambda model: (
        model.set_strength(0.3),
        evaluated(model),
        model.set_strength(1.0),
        train_vectors(model, seed=4),
    ),
    "strength's data": lambda model: (
        model.set_strength(0.3),
        evaluated(model),
        layer_of(model).strength("default").data.fill_(0.6),
    ),
    "both adapters": lambda model: model.base_model.set_adapter(["default", "second"]),
    "bias": torch.no_grad()(lambda model: layer_of(model).base_layer.bias.add_(1)),
    "bias, its data": lambda model: layer_of(model).base_layer.bias.data.add_(1),
    "bias replaced": lambda model: setattr(
        layer_of(model).base_layer, "bias", nn.Parameter(torch.ones(8), requires_grad=False)
    ),
    "no bias": lambda model: setattr(layer_of(model).base_layer, "bias", None),
    "a layer replaced": lambda model: setattr(inner(model), CHANGED, copy.deepcopy(layer_of(model, "lin0"))),
    "a layer deleted": lambda model: setattr(inner(model), CHANGED, nn.Identity()),
    "a layer called twice": lambda model: setattr(inner(model), CHANGED, layer_of(model, "lin0")),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_between_passes_is_followed(operation: str) -> None:
    for mode in MODES:
        model = adapted(("default", "second")).eval()
        with mode():
            before = [model(inputs()).clone() for _ in range(3)]
        OPERATIONS[operation](model)
        expected = evaluated(alone(model))
        with mode():
            for _ in range(2):
                torch.testing.assert_close(model(inputs()).clone(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before[2], expected, atol=1e-5)


def test_values_of_another_adapter_are_followed(tmp_path: Path) -> None:
    source = adapted()
    train_vectors(source, seed=5)
    source.save_pretrained(tmp_path)
    model = adapted().eval()
    for _ in range(3):
        evaluated(model)
    dvora.hotswap_adapter(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(evaluated(model), evaluated(source.eval()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
def test_modes_and_dtypes_may_alternate(distribution: str) -> None:
    model = adapted(projection_init=distribution).eval()
    model.requires_grad_(False)

    def under_autocast(dtype: torch.dtype) -> Callable[[PeftModel], Tensor]:
        def run(of: PeftModel) -> Tensor:
            with torch.autocast("cpu", dtype), torch.no_grad():
                return of(inputs())

        return run

    def in_inference_mode(of: PeftModel) -> Tensor:
        with torch.inference_mode():
            return of(inputs()).clone()

    def for_inputs(of: PeftModel) -> Tensor:
        x = inputs().requires_grad_()
        (gradient,) = torch.autograd.grad(of(x).square().sum(), x)
        return gradient

    ways = [evaluated, in_inference_mode, for_inputs, *map(under_autocast, (torch.bfloat16, torch.float16))]
    for index in (3, 0, 1, 2, 4, 2, 1, 0, 3, 1, 2, 0, 4, 3):
        torch.testing.assert_close(ways[index](model), ways[index](alone(model)), rtol=1e-5, atol=1e-6)


def test_a_model_may_be_cast_between_evaluations() -> None:
    model = adapted().eval()
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float64):
        evaluated(model, inputs().to(next(model.parameters()).dtype))
        model.to(dtype)
        for _ in range(2):
            torch.testing.assert_close(
                evaluated(model, inputs().to(dtype)), evaluated(alone(model), inputs().to(dtype))
            )


@pytest.mark.parametrize("layer", CASES)
def test_every_layer_type_follows_writes_that_are_not_counted(layer: str) -> None:
    subject = LayerType(layer, "float64")
    model = subject.adapted()
    for _ in range(3):
        with torch.no_grad():
            before = model(subject.x())
            for name, parameter in model.named_parameters():
                if ".dvora_" in name:
                    parameter.data.mul_(1.3)
            found, expected = model(subject.x()), alone(model)(subject.x())
        assert subject.close(found, expected)
        assert not subject.close(found, before)


# Copies.


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_independent_and_clean(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted()
    expected = trained(model)
    trained(model), evaluated(model), evaluated(model)
    made = copied(model)
    for name in ("lin0", CHANGED):
        assert layer_of(made, name).adapted("default").kept.stacked is None
        assert layer_of(made, name).adapted("default").kept.evaluated is None
    train_vectors(made, seed=3)
    for each in (made, model):
        assert trained(each).differ(trained(alone(each))) < 1e-5
        torch.testing.assert_close(evaluated(each), evaluated(alone(each)), rtol=1e-5, atol=1e-6)
    assert trained(model).differ(expected) < 1e-5
    assert current_pass() is None


def test_a_copy_that_is_made_in_the_middle_of_a_pass_is_clean() -> None:
    model, made = adapted(), []
    trained(model)
    handle = inner(model).middle.register_forward_pre_hook(lambda *_: made.append(copy.deepcopy(model)))
    trained(model)
    handle.remove()
    inner(made[0]).middle._forward_pre_hooks.clear()
    train_vectors(made[0], seed=3)
    for _ in range(2):
        assert trained(made[0]).differ(trained(alone(made[0]))) < 1e-5


def size(module: nn.Module) -> int:
    return len(pickle.dumps(module))


def test_a_pickle_of_one_layer_does_not_hold_the_constants_of_all() -> None:
    model = adapted(r=200, projection_init="kaiming_uniform")
    fresh = size(layer_of(model).adapted("default"))
    for _ in range(2):
        trained(model)
    assert layer_of(model).adapted("default").C._base is not None  # a part of one tensor for all
    assert size(layer_of(model).adapted("default")) < fresh + 1000
    evaluated(model)
    assert size(layer_of(model).adapted("default")) < fresh + 1000
