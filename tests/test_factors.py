"""The row factors of layers made at once: those of the definition; and when a model's passes make them again."""

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dvora import DVoRAAdapter, SharedProjections
from dvora import factors as source
from dvora.factors import (
    FactorSource,
    StackConstants,
    add_factor_pass,
    current_pass,
    delta_weight,
    factors_of,
    stacked_factors,
)
from dvora.functional import Vectors
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.weight import AdaptedWeight
from tests.cases import DIRECTIONS, TOLERANCE, fresh_copy, nearly_cancelled, randn, trained_layer
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 6, 9, 4
WIDTH = 6

directions = pytest.mark.parametrize("direction", DIRECTIONS)
distributions = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
settings = st.fixed_dictionaries(
    {"direction": st.sampled_from(DIRECTIONS), "detach_norm": st.booleans(), "alpha": st.floats(0.1, 10)}
)


class Stack:
    """L layers of one shape with an adapter each."""

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int] = (IN, OUT, RANK),
        dtype: torch.dtype = torch.float64,
        distribution: str = "kaiming_uniform",
        **options: object,
    ) -> None:
        in_features, out_features, rank = shape
        shared = SharedProjections(3, distribution)
        self.weights = [randn(out_features, in_features, seed=10 + i, dtype=dtype) for i in range(layers)]
        self.adapted = [AdaptedWeight(weight, rank, shared=shared, **options) for weight in self.weights]
        norms = torch.stack([weight.norm(dim=1) for weight in self.weights])[:, None]
        self.vectors = Vectors(
            norms * (0.5 + randn(layers, 1, out_features, seed=4, dtype=dtype).abs()),
            randn(layers, 1, out_features, seed=5, dtype=dtype),
            0.3 * randn(layers, 1, rank, seed=6, dtype=dtype),
        )


@directions
@distributions
def test_second_derivatives_equal_finite_differences(distribution: str, direction: str) -> None:
    stack = Stack(2, (3, 4, 2), distribution=distribution, direction=direction)
    stack.weights[0][1] = 0
    stack.adapted[0].refresh(stack.weights[0])
    constants = StackConstants.of(stack.adapted)
    vectors = tuple(v.requires_grad_() for v in stack.vectors)

    def made(*vectors: Tensor) -> tuple[Tensor, Tensor]:
        return stacked_factors(Vectors(*vectors), constants)[:2]

    assert torch.autograd.gradcheck(made, vectors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(made, vectors)


@distributions
@directions
@pytest.mark.parametrize("shape", [(64, 64, 8), (10, 20, 40), (120, 768, 64)], ids=str)
def test_the_definition_gives_the_bits_of_the_stack(
    shape: tuple[int, int, int], direction: str, distribution: str
) -> None:
    stack = Stack(3, shape, torch.float32, distribution, direction=direction)
    together = stacked_factors(stack.vectors, StackConstants.of(stack.adapted))
    for layer, (adapted, weight) in enumerate(zip(stack.adapted, stack.weights, strict=True)):
        vectors = Vectors(*(vector[layer, 0] for vector in stack.vectors))
        for ours, theirs in zip(adapted.factors(vectors, weight), together, strict=True):
            assert torch.equal(ours, theirs[layer, 0])


def test_constants_are_joined_only_while_they_are_parts_of_one_tensor() -> None:
    stack = Stack(3)
    whole = StackConstants.of(stack.adapted)
    assert whole.fit(stack.adapted)
    assert StackConstants.of(stack.adapted).C is whole.C
    for order in ([1, 0, 2], [0, 1], [1, 2], [0], [0, 0, 2]):
        chosen = [stack.adapted[index] for index in order]
        assert not whole.fit(chosen)
        found = StackConstants.of(chosen).C
        assert torch.equal(found, torch.stack([adapted.C for adapted in chosen])), order
    stack.weights[1].mul_(2)
    stack.adapted[1].refresh(stack.weights[1])
    assert not whole.fit(stack.adapted)


# Rows near cancellation.


@directions
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained base"])
@given(ratio=st.sampled_from([0.3, 1e-2]), tokens=st.sampled_from([4, 600]))
def test_outputs_of_nearly_cancelled_layers_are_right_to_some_hundred_thousandths(
    frozen: bool, direction: str, ratio: float, tokens: int
) -> None:
    layer = nearly_cancelled(trained_layer(24, 10, 4, direction=direction, freeze_base_layer=frozen), ratio)
    assert DenseDVoRA.of(layer).norm_ratio().max() < 3 * ratio
    x = randn(tokens, 24, seed=8)
    expected = DenseDVoRA.of(layer)(x)
    # The terms are g = w / n times larger than their sum, each with its rounding: of 24 terms and g = 100, what one
    # processor's order of summing makes 1.9e-5 and another's 2.5e-5.
    assert worst_error(layer(x), expected) < 4e-5
    with torch.no_grad():
        assert worst_error(layer.eval()(x), expected) < 4e-5


@dtypes
def test_a_row_that_vanishes_altogether_gives_finite_numbers(dtype: torch.dtype) -> None:
    layer = nearly_cancelled(trained_layer(3, 4, 1, dtype=dtype), 0.0)
    x = randn(5, 3, seed=8, dtype=dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (x, *layer.vectors))


# One adapter of one layer.


def source_of(layer: DVoRAAdapter, strength: Tensor | None = None) -> tuple[FactorSource, Tensor]:
    return FactorSource(layer.adapted, layer.vectors, strength), layer.base_layer.weight


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, -1.0])
@pytest.mark.parametrize("trained", [True, False])
def test_a_strength_scales_update_and_gain(trained: bool, strength: float) -> None:
    layer = trained_layer(IN, OUT, RANK)
    with torch.set_grad_enabled(trained):
        full = factors_of(*source_of(layer))
        scaled = factors_of(*source_of(layer, torch.tensor(strength)))
    torch.testing.assert_close(scaled.gain_minus_one, strength * full.gain_minus_one)
    torch.testing.assert_close(scaled.scale, strength * full.scale)
    torch.testing.assert_close(scaled.gain, 1 + strength * full.gain_minus_one)
    if strength == 1:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(scaled[:4], full[:4], strict=True))


@directions
def test_the_delta_has_the_precision_of_the_forward(direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, direction=direction)
    with torch.autocast("cpu", torch.bfloat16):
        delta = delta_weight(layer.adapted, layer.vectors, layer.base_layer.weight)
    dense = DenseDVoRA.of(layer)
    assert worst_error(delta, dense.merged_weight() - dense.weight) < 1e-6


def test_norms_of_vectors_in_half_precision_are_not() -> None:
    dtype = torch.bfloat16
    layer, x = trained_layer(IN, OUT, RANK), randn(4, IN, seed=0)
    for vector in layer.vectors:
        vector.data = vector.data.to(dtype).float()
    outputs, expected = layer(x), torch.autograd.grad(layer(x).square().sum(), layer.vectors)
    for vector in layer.vectors:
        vector.data = vector.data.to(dtype)
    assert torch.equal(layer(x), outputs)
    for ours, whole in zip(torch.autograd.grad(layer(x).square().sum(), layer.vectors), expected, strict=True):
        assert ours.dtype == dtype
        assert worst_error(ours, whole.double()) < 2 * torch.finfo(dtype).eps


# Passes of a model.


class Model(nn.Module):
    def __init__(self, count: int = 3, passes: bool = True, width: int = WIDTH, rank: int = RANK) -> None:
        super().__init__()
        self.layers = nn.ModuleList(trained_layer(width, width, rank) for _ in range(count))
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                layer.lambda_d.mul_(1 + index)
        if passes:
            add_factor_pass(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def alone(self) -> "Model":
        made = Model(0, passes=False)
        made.layers.extend(fresh_copy(layer).train(layer.training) for layer in self.layers)
        return made


def inputs(tokens: int = 4) -> Tensor:
    return randn(tokens, WIDTH, seed=8)


def step(model: nn.Module, tokens: int = 4) -> list[Tensor]:
    model.zero_grad()
    model(inputs(tokens)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert worst_error(one, other.double()) < 1e-5


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers factors are made for, one entry for each time."""
    made: list[int] = []
    make = source.layer_factors
    with monkeypatch.context() as patch:
        patch.setattr(source, "layer_factors", lambda sources, c: made.append(len(sources)) or make(sources, c))
        yield made


FEW_AND_MANY = pytest.mark.parametrize("tokens", [4, 40], ids=["thin", "folded"])


@FEW_AND_MANY
def test_layers_are_learnt_from_the_last_pass_that_trained(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    model = Model()
    with counted(monkeypatch) as made:
        first = step(model, tokens)
        assert made == [1, 1, 1]
        second = step(model, tokens)
        assert made[3:] == [3]
        step(model, tokens)
        assert made[4:] == [3]
    assert all(map(torch.equal, first, second))
    assert_equal(second, step(model.alone(), tokens))


def test_evaluation_makes_factors_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    with torch.no_grad(), counted(monkeypatch) as made:
        outputs = [model(inputs()) for _ in range(4)]
        assert made == [1, 1, 1]
        model.layers[1].lambda_b.mul_(2)
        changed = model(inputs())
        assert made[3:] == [3]
        assert all(torch.equal(outputs[0], other) for other in outputs)
        torch.testing.assert_close(changed, model.alone()(inputs()))
    with torch.inference_mode(), counted(monkeypatch) as made:
        assert torch.equal(model(inputs()), changed)
        assert made == []


def test_a_training_pass_ends_what_evaluation_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    step(model)
    with torch.no_grad():
        model(inputs())
        model(inputs())
    with counted(monkeypatch) as made:
        step(model)
        with torch.no_grad():
            model(inputs())
    # Not every optimizer's step is counted as a write, and only on a CPU values are compared.
    assert made == [3, 3]


def test_a_layer_called_by_itself_takes_nothing_of_the_models_last_pass() -> None:
    model = Model()
    step(model)
    model(inputs())
    layer = model.layers[0]
    layer.lambda_b.data.mul_(1.5)
    torch.testing.assert_close(layer(inputs()), fresh_copy(layer)(inputs()))


def test_layers_that_are_added_used_no_more_or_gone_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    step(model)
    model.layers.append(trained_layer(WIDTH, WIDTH, RANK))
    step(model)
    with counted(monkeypatch) as made:
        step(model)
        assert made == [4]
    gone = [weakref.ref(model.layers[1].adapted), weakref.ref(model.layers[1].magnitude)]
    del model.layers[1]
    model.zero_grad(set_to_none=True)
    step(model)
    with counted(monkeypatch) as made:
        found = step(model)
    assert made == [3]
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert_equal(found, step(model.alone()))


def test_a_layer_that_is_not_called_gets_no_gradient() -> None:
    model = Model()
    step(model)
    model.zero_grad()
    first, *others = model.layers
    model.layers = nn.ModuleList([first])
    step(model)
    assert first.lambda_b.grad is not None
    assert all(parameter.grad is None for layer in others for parameter in layer.parameters())


@pytest.mark.parametrize(
    "options",
    [{"direction": "weight"}, {"detach_norm": True}, {"alpha": 7.0}, {"shared": SharedProjections(3)}, {"bias": False}],
    ids=lambda options: next(iter(options)),
)
def test_layers_that_differ_are_stacks_of_their_own(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    model.layers.append(trained_layer(WIDTH, WIDTH, RANK, **options))
    step(model)
    with counted(monkeypatch) as made:
        found = step(model)
    assert made == ([4] if "bias" in options else [3, 1])
    assert_equal(found, step(model.alone()))


@FEW_AND_MANY
def test_a_trained_model_can_be_freed(tokens: int) -> None:
    model = Model()
    for _ in range(3):
        step(model, tokens)
    with torch.no_grad():
        model(inputs())
    adapted = [weakref.ref(layer.adapted) for layer in model.layers]
    del model
    gc.collect()
    assert [reference() for reference in adapted] == [None] * 3


def test_a_trained_base_or_another_dtype_of_vectors_beside_the_others() -> None:
    model = Model()
    model.layers.append(trained_layer(WIDTH, WIDTH, RANK, freeze_base_layer=False))
    for name in Vectors._fields:
        setattr(model.layers[1], name, nn.Parameter(getattr(model.layers[1], name).detach().double()))
    expected = step(model.alone())
    for _ in range(3):
        assert_equal([gradient.float() for gradient in step(model)], expected)
    assert model.layers[1].lambda_b.grad.dtype == torch.float64


def test_several_passes_may_be_open_until_one_backward_pass_reaches_them() -> None:
    model, alone = Model(), Model().alone()
    step(model)
    model.zero_grad()
    for each in (model, alone):
        sum(each(randn(tokens, WIDTH, seed=tokens)).square().sum() for tokens in (4, 40, 7)).backward()
    assert_equal([p.grad for p in model.trained()], [p.grad for p in alone.trained()])


class Checkpointed(Model):
    """Every layer checkpointed, or some, or all as one part."""

    parts: Callable[[int], bool] | None = None
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if self.parts is None:
            return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)
        for index, layer in enumerate(self.layers):
            wrapped = partial(checkpoint, layer, use_reentrant=self.use_reentrant) if self.parts(index) else layer
            x = torch.tanh(wrapped(x))
        return x


@FEW_AND_MANY
@pytest.mark.parametrize("parts", [None, lambda _: True, lambda index: index % 2], ids=["one part", "each", "some"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_train_to_the_same_gradients(
    use_reentrant: bool, parts: Callable[[int], bool] | None, tokens: int
) -> None:
    model = Checkpointed()
    model.parts, model.use_reentrant = parts, use_reentrant
    expected = step(model.alone(), tokens)
    for _ in range(3):
        model.zero_grad()
        model(inputs(tokens).requires_grad_()).square().sum().backward()
        assert_equal([p.grad for p in model.trained()], expected)


def test_a_write_within_a_pass_is_seen_by_the_layers_that_come_after() -> None:
    model = Model()

    def write(*_: object) -> None:
        with torch.no_grad():
            model.layers[2].lambda_b.mul_(1.5)

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                model(inputs())
            hook = model.layers[1].register_forward_hook(write)
            y = model(inputs())
            hook.remove()
            torch.testing.assert_close(y, model.alone()(inputs()))


@pytest.mark.parametrize(("width", "rank"), [(310, 16), (33, 5)])
def test_every_evaluation_gives_the_same_bits_from_the_first_on(width: int, rank: int) -> None:
    # Where the parts of a stack are not aligned in memory, products with them round in another way than alone.
    model, x = Model(5, width=width, rank=rank), randn(4, width, seed=8)
    with torch.no_grad():
        first = model(x)
        for _ in range(2):
            assert torch.equal(model(x), first)
        model.layers.extend(Model(1, width=width, rank=rank).layers)
        longer = model(x)
        for _ in range(2):
            assert torch.equal(model(x), longer)


def test_a_pass_of_functional_call_trains_the_values_that_it_was_given() -> None:
    model = Model()
    step(model)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {n: (1.2 * p.detach()).requires_grad_() for n, p in own.items()}
    found = torch.autograd.grad(functional_call(model, values, inputs()).sum(), list(values.values()))
    fresh = Model(passes=False)
    fresh.load_state_dict({**model.state_dict(), **values})
    names = dict(fresh.named_parameters())
    assert_equal(found, torch.autograd.grad(fresh(inputs()).sum(), [names[name] for name in values]))
    assert_equal(step(model), step(model.alone()))


# Passes begin and end.


def test_a_model_within_a_model_has_passes_of_its_own() -> None:
    inner = Model()
    outer = nn.Sequential(trained_layer(WIDTH, WIDTH, RANK), inner, trained_layer(WIDTH, WIDTH, RANK))
    add_factor_pass(outer)
    alone = nn.Sequential(fresh_copy(outer[0]), inner.alone(), fresh_copy(outer[2]))
    for _ in range(3):
        assert_equal(step(outer), step(alone))
    assert current_pass() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_pass_ends_with_an_error_and_those_within_it_that_an_interruption_left_open(
    error: type[BaseException],
) -> None:
    inner, outer = Model(), Model(1)
    outer.layers.append(inner)
    step(outer)

    def fail(*_: object) -> None:
        raise error

    hook = inner.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        outer(inputs())
    hook.remove()
    # What a hook of PyTorch's could not end after Ctrl-C, the next pass ends.
    assert_equal(step(outer), step(outer))
    assert current_pass() is None


@pytest.mark.usefixtures("hasty_threads")
def test_threads_may_train_and_evaluate_one_model_at_once() -> None:
    model = Model()
    expected, evaluated = step(model), model(inputs()).detach()

    def run(index: int) -> bool:
        for _ in range(10):
            if index % 2:
                found = torch.autograd.grad(model(inputs()).square().sum(), model.trained())
                good = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))
            else:
                with torch.no_grad():
                    good = torch.equal(model(inputs()), evaluated)
            if not good:
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(6)))
