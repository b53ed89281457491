"""The row factors of one layer: made once, kept in evaluation, and made again when anything has changed.

`test_caches.py` goes through what users can do to a layer; here are the objects themselves, for every device.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from dvora import SharedProjections
from dvora.method.functional import Vectors
from dvora.method.packed_factors import PackedFactors
from dvora.ops.passes import Pass, enter, leave
from dvora.weight.adapted_weight import AdaptedWeight
from dvora.weight.factors import _TOGETHER, Asked, StackedEntry, factor_rows, factors_of, have_values
from dvora.weight.tensor_state import SameTensor
from tests.cases import COPIES, SHARED, fresh_copy, linear, randn, trained_layer

OUT, IN, RANK = 5, 6, 3
both_devices = pytest.mark.parametrize("device", ["cpu", "meta"])
"""The meta device stands for those whose values are not read."""


class Factory:
    """Takes the place of `AdaptedWeight.packed_factors`, counts its calls, and calls something in the middle."""

    def __init__(self, within: Callable[[], object] = lambda: None) -> None:
        self.made, self.within = 0, within

    def __call__(self, adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None) -> tuple[PackedFactors, Tensor]:
        self.made += 1
        self.within()
        zeros = vectors.lambda_d.new_zeros
        return PackedFactors(zeros(2, OUT), zeros(2, OUT), zeros(RANK)), adapted.w


def counted(monkeypatch: pytest.MonkeyPatch, factory: Factory) -> Factory:
    monkeypatch.setattr(AdaptedWeight, "packed_factors", lambda *args: factory(*args))
    return factory


def parameters(device: str = "cpu") -> Vectors:
    return Vectors(*(nn.Parameter(randn(size, seed=size)).to(device).detach() for size in (OUT, OUT, RANK)))


def adapted_and_weight() -> tuple[AdaptedWeight, Tensor]:
    weight = linear(IN, OUT).weight.detach()
    return AdaptedWeight(weight, RANK, shared=SHARED), weight


@pytest.fixture
def within_a_pass() -> Iterator[None]:
    owner = object()
    enter(owner, Pass())
    yield
    leave(owner)


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
    assert have_values([tensor], torch.ones(3)) == same


@both_devices
def test_factors_are_made_again_for_other_inputs_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, weight = adapted_and_weight()
    make, vectors, strength = counted(monkeypatch, Factory()), parameters(device), torch.ones(()).to(device)
    first = factors_of(adapted, vectors, weight)
    assert factors_of(adapted, vectors, weight) is first
    for index in range(3):
        vectors[index].add_(1)
        factors_of(adapted, vectors, weight)
        assert make.made == index + 2
    others = [weight.clone(), None]
    for of, own in [(strength, weight), (None, weight), (strength, weight), *[(None, other) for other in others]]:
        before = make.made
        factors_of(adapted, vectors, own, of)
        factors_of(adapted, vectors, own, of)
        assert make.made == before + 1
    strength.mul_(2)
    for again in (lambda: adapted.refresh(weight), lambda: setattr(adapted, "w", adapted.w.clone())):
        factors_of(adapted, vectors, weight)
        before = make.made
        again()
        factors_of(adapted, vectors, weight)
        assert make.made == before + 1


@both_devices
def test_a_strength_that_was_written_to_is_followed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, weight = adapted_and_weight()
    make, vectors, strength = counted(monkeypatch, Factory()), parameters(device), torch.ones(()).to(device)
    factors_of(adapted, vectors, weight, strength)
    strength.mul_(2)
    factors_of(adapted, vectors, weight, strength)
    assert make.made == 2


def test_factors_are_neither_part_of_a_graph_nor_of_inference_mode() -> None:
    for mode in (torch.inference_mode, torch.enable_grad):
        adapted, weight = adapted_and_weight()
        with mode():
            found = factors_of(adapted, parameters(), weight).packed
        assert not any(factor.is_inference() or factor.requires_grad for factor in found)


@both_devices
@pytest.mark.parametrize("which", ["a vector", "the weight"])
def test_factors_of_what_is_written_to_meanwhile_are_not_kept(
    which: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapted, weight), vectors = adapted_and_weight(), parameters(device)
    written = vectors.lambda_b if which == "a vector" else weight
    make = counted(monkeypatch, Factory(lambda: written.add_(1)))
    factors_of(adapted, vectors, weight)
    assert adapted.kept.evaluated is None
    make.within = lambda: None
    factors_of(adapted, vectors, weight)
    factors_of(adapted, vectors, weight)
    assert make.made == 2


def test_factors_in_evaluation_are_made_from_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Read are copies, so that a write in the middle gives those of before, whole.
    (adapted, weight), vectors = adapted_and_weight(), parameters()
    expected = factors_of(adapted, Vectors(*map(torch.clone, vectors)), weight).packed.trained
    adapted.kept.evaluated, make = None, AdaptedWeight.packed_factors

    def written_first(self: AdaptedWeight, *args: object) -> PackedFactors:
        vectors.magnitude.add_(1)
        return make(self, *args)

    monkeypatch.setattr(AdaptedWeight, "packed_factors", written_first)
    assert torch.equal(factors_of(adapted, vectors, weight).packed.trained, expected)


def test_outside_of_a_pass_values_are_compared_every_time() -> None:
    (adapted, weight), vectors = adapted_and_weight(), parameters()
    first = factors_of(adapted, vectors, weight)
    vectors.magnitude.data.mul_(2)
    second = factors_of(adapted, vectors, weight)
    torch.testing.assert_close(second.packed.constant[0], 2 * first.packed.constant[0])


@pytest.mark.usefixtures("within_a_pass")
def test_within_a_pass_values_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (adapted, weight), vectors, compared = adapted_and_weight(), parameters(), []
    factors_of(adapted, vectors, weight)
    monkeypatch.setattr("dvora.weight.factors.have_values", lambda *pair: compared.append(pair) or True)
    for _ in range(3):
        factors_of(adapted, vectors, weight)
    assert len(compared) <= 1
    other = object()
    enter(other, Pass())
    factors_of(adapted, vectors, weight)
    leave(other)
    assert len(compared) <= 6


@pytest.mark.usefixtures("within_a_pass")
def test_within_a_pass_tensors_of_equal_values_are_compared_themselves() -> None:
    (adapted, weight), vectors = adapted_and_weight(), parameters()
    first = factors_of(adapted, vectors, weight)
    twins = Vectors(*map(torch.clone, vectors))
    assert factors_of(adapted, twins, weight) is first
    twins.magnitude.data.mul_(2)
    found = factors_of(adapted, twins, weight)
    torch.testing.assert_close(found.packed.constant[0], 2 * first.packed.constant[0])


def test_a_pass_knows_what_was_asked_for_without_keeping_it_alive() -> None:
    (adapted, weight), vectors, owner, running = adapted_and_weight(), parameters(), object(), Pass()
    enter(owner, running)
    factors_of(adapted, vectors, weight)
    leave(owner)
    (asked,) = running.asked.values()
    assert isinstance(asked, Asked)
    assert asked.adapted() is adapted
    assert asked.weight() is weight
    assert all(own() is vector for own, vector in zip(asked.vectors, vectors, strict=True))
    held = [weakref.ref(each) for each in (adapted, weight, *vectors)]
    del adapted, weight, vectors
    gc.collect()
    assert all(reference() is None for reference in held)


def test_a_pass_that_trains_drops_what_evaluation_keeps() -> None:
    (adapted, weight), vectors = adapted_and_weight(), parameters()
    for index in range(3):
        factors_of(adapted, vectors, weight)
        assert adapted.kept.evaluated is not None
        trained = [vector.detach().requires_grad_(index == own) for own, vector in enumerate(vectors)]
        found = factors_of(adapted, Vectors(*trained), weight)
        assert adapted.kept.evaluated is None
        assert found.packed.trained.requires_grad or found.packed.lambda_d.requires_grad
        assert found.prepared is None


# What is made for tokens of a dtype.


def layer_and_inputs(**options: object) -> tuple[nn.Module, Tensor]:
    return trained_layer(IN, OUT, RANK, **options).eval(), randn(4, IN, seed=8)


def prepared(layer: nn.Module) -> dict[torch.dtype, Callable[..., Tensor]]:
    return layer.adapted.kept.evaluated.factors.prepared


def test_what_is_prepared_is_kept_for_tokens_of_each_dtype() -> None:
    layer, x = layer_and_inputs(dtype=torch.float32)
    with torch.no_grad():
        layer(x)
        (known,) = prepared(layer).values()
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x)
    assert prepared(layer)[torch.float32] is known
    assert len(prepared(layer)) == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda bias: bias.mul_(2),
        lambda bias: bias.detach().mul_(2),
        lambda bias: bias.data.mul_(2),
        lambda bias: bias.detach().numpy().fill(0.7),
        lambda bias: setattr(bias, "data", 2 * bias.data),
        lambda bias: nn.utils.vector_to_parameters(2 * bias.detach(), [bias]),
    ],
    ids=["in place", "through detach", "data in place", "NumPy", "data assigned", "vector_to_parameters"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_bias_is_followed(mode: Callable[[], object], write: Callable[[Tensor], object]) -> None:
    layer, x = layer_and_inputs()
    with mode():
        layer(x)
    with torch.no_grad():
        write(layer.base_layer.bias)
    with mode():
        assert torch.equal(layer(x), fresh_copy(layer).eval()(x))


@pytest.mark.parametrize("bias", [None, nn.Parameter(randn(OUT, seed=7), requires_grad=False)], ids=["none", "other"])
def test_another_bias_and_none_are_followed(bias: nn.Parameter | None) -> None:
    layer, x = layer_and_inputs()
    own = layer.base_layer.bias
    with torch.no_grad():
        for each in (own, bias, own):
            layer.base_layer.bias = each
            assert torch.equal(layer(x), fresh_copy(layer).eval()(x))


def test_a_bias_that_is_not_a_number_is_followed_to_one_that_is() -> None:
    layer, x = layer_and_inputs()
    with torch.no_grad():
        expected, value = layer(x), float(layer.base_layer.bias[1])
        layer.base_layer.bias.data[1] = torch.nan
        assert layer(x)[:, 1].isnan().all()
        layer.base_layer.bias.data[1] = value
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
@pytest.mark.parametrize("first", [torch.bfloat16, None], ids=["on, off", "off, on"])
def test_autocast_may_go_on_and_off_between_evaluations(first: torch.dtype | None, distribution: str) -> None:
    layer, x = layer_and_inputs(shared=SharedProjections(3, distribution))
    with torch.no_grad():
        for dtype in (first, None, first, torch.bfloat16):
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
                assert torch.equal(layer(x), fresh_copy(layer).eval()(x))


@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
def test_outputs_may_come_in_another_dtype_for_the_same_tokens(distribution: str) -> None:
    layer, x = layer_and_inputs(shared=SharedProjections(3, distribution))
    dtype = torch.float16
    layer.base_layer.register_forward_hook(lambda _, __, y: y.to(dtype))
    expected = fresh_copy(layer).eval()(x)
    with torch.no_grad():
        for dtype in (torch.float16, torch.float32, torch.float16, torch.float64):  # noqa: B007  # the hook reads it
            torch.testing.assert_close(layer(x).float(), expected.detach(), rtol=0.01, atol=0.02)


def test_a_known_bias_is_not_kept_alive() -> None:
    layer, x = layer_and_inputs()
    with torch.no_grad():
        layer(x)
        known = weakref.ref(layer.base_layer.bias)
        layer.base_layer.bias = None
    gc.collect()
    assert known() is None
    assert prepared(layer)


def test_no_copy_has_what_is_kept() -> None:
    layer, x = layer_and_inputs()
    with torch.no_grad():
        layer(x)
    layer.adapted.kept.stacked = threading.Lock()  # as little as a graph can it be copied
    for made in (copied(layer) for copied in COPIES.values()):
        assert made.adapted.kept.evaluated is None
        assert made.adapted.kept.stacked is None
        with torch.no_grad():
            assert torch.equal(made(x), layer(x))
    assert layer.adapted.kept.evaluated is not None


# An entry of training.


def entry(adapted: AdaptedWeight, vectors: Vectors, weight: Tensor | None, running: Pass) -> StackedEntry:
    known = None if weight is None else SameTensor(weight)
    made = StackedEntry(Asked.of(adapted, vectors, weight), (), vectors, known, running)
    made.norm = adapted.norm(weight)
    return made


def trained() -> Vectors:
    return Vectors(*(nn.Parameter(vector) for vector in parameters()))


def test_an_entry_serves_its_own_pass() -> None:
    (adapted, weight), vectors, running = adapted_and_weight(), trained(), Pass()
    made = entry(adapted, vectors, weight, running)
    assert made.fits(adapted, vectors, weight, running)
    assert not made.fits(adapted, vectors, weight, Pass())
    assert not made.fits(adapted, vectors, weight, None)


CHANGES: dict[str, Callable[[AdaptedWeight, Vectors, Tensor], object]] = {
    "magnitude": lambda _, vectors, __: vectors.magnitude.detach().add_(1),
    "lambda_b": lambda _, vectors, __: vectors.lambda_b.detach().add_(1),
    "lambda_d": lambda _, vectors, __: vectors.lambda_d.detach().add_(1),
    "frozen": lambda _, vectors, __: vectors.lambda_b.requires_grad_(False),
    "data assigned": lambda _, vectors, __: setattr(vectors.lambda_d, "data", vectors.lambda_d.data + 1),
    "weight": lambda _, __, weight: weight.add_(1),
    "weight's data assigned": lambda _, __, weight: setattr(weight, "data", weight.data + 1),
    "constants": lambda adapted, _, weight: adapted.refresh(weight),
    "cast": lambda adapted, _, __: adapted.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_entry_does_not_fit_after_a_change(change: str) -> None:
    (adapted, weight), vectors, running = adapted_and_weight(), trained(), Pass()
    made = entry(adapted, vectors, weight, running)
    CHANGES[change](adapted, vectors, weight)
    assert not made.fits(adapted, vectors, weight, running)


def test_an_entry_fits_no_other_tensors_of_the_same_values() -> None:
    (adapted, weight), vectors, running = adapted_and_weight(), trained(), Pass()
    made = entry(adapted, vectors, weight, running)
    assert not made.fits(adapted, vectors, weight.clone(), running)
    assert not made.fits(adapted, vectors, None, running)
    assert not entry(adapted, vectors, None, running).fits(adapted, vectors, weight, running)
    for index in range(3):
        others = [nn.Parameter(v.detach().clone()) if i == index else v for i, v in enumerate(vectors)]
        assert not made.fits(adapted, Vectors(*others), weight, running)


class Many:
    """More adapters of one layer than are compared together, every third of another strength."""

    def __init__(self, device: str) -> None:
        self.weight = linear(IN, OUT).weight.detach()
        self.weights = [AdaptedWeight(self.weight, RANK, shared=SHARED) for _ in range(2 * _TOGETHER + 1)]
        self.inputs: list[tuple[Tensor, ...]] = []
        for number in range(len(self.weights)):
            vectors = tuple((randn(size, seed=number) + 2).to(device) for size in (OUT, OUT, RANK))
            strength = (torch.tensor(0.5, device=device),)
            self.inputs.append(vectors if number % 3 else (*vectors, *strength))

    def rows(self) -> Tensor:
        return factor_rows(self.weights, self.inputs, self.weight)

    def expected(self) -> Tensor:
        found = []
        for adapted, (m, b, d, *strength) in zip(self.weights, self.inputs, strict=True):
            packed, _ = adapted.packed_factors(Vectors(m, b, d), self.weight)
            found.append((packed.weakened(*strength) if strength else packed).row)
        return torch.stack(found)


def test_the_factors_of_many_adapters_are_those_of_each() -> None:
    many = Many("cpu")
    assert torch.equal(many.rows(), many.expected())
    many.inputs[-1][0].data.mul_(3)
    assert torch.equal(many.rows(), many.expected())
    many.weight.mul_(2)
    # Before anything else looks at the weight and renews the norms.
    assert torch.equal(many.rows(), many.expected())


@both_devices
@pytest.mark.parametrize("place", [0, _TOGETHER, 2 * _TOGETHER])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_only_the_changed_of_many_adapters_is_made_again(
    device: str, place: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, make = Many(device), counted(monkeypatch, Factory())
    for _ in range(2):
        many.rows()
        assert make.made == len(many.weights)
    index = min(index, len(many.inputs[place]) - 1)
    many.inputs[place][index].add_(1)
    many.rows()
    assert make.made == len(many.weights) + 1
    many.inputs[place] = (
        many.inputs[place][:3] if len(many.inputs[place]) > 3 else (*many.inputs[place], torch.ones(()))
    )
    many.rows()
    assert make.made == len(many.weights) + 2


def test_a_pass_does_not_compare_many_adapters_for_the_next() -> None:
    many, owner, running = Many("cpu"), object(), Pass()
    enter(owner, running)
    many.rows()
    leave(owner)
    assert not running.asked
