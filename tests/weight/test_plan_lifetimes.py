"""Plans and what is around them: threads, calls within calls, copies, exceptions, and memory that must be given back.

Nothing here calls the garbage collector to free anything: what a plan holds goes with its adapter.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dvora.matrices.interface import DISTRIBUTIONS
from dvora.ops.passes import current_pass
from tests.cases import COPIES, randn
from tests.tuner.tiny import dvora_layers, train_vectors
from tests.tuner.towers import LAYERS, adapted, alone, evaluated, in_the_middle, inner, inputs, layer_of, trained
from tests.weight.planned import close, followed, watched, with_plans

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
TWO = ("default", "second")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# Threads.


@pytest.mark.usefixtures("hasty_threads")
@every_distribution
def test_threads_of_one_model_get_their_own_outputs(distribution: str) -> None:
    model, batches = with_plans(adapted(projection_init=distribution)), [inputs(seed, rows=seed) for seed in (1, 2, 5)]
    expected = [evaluated(alone(model), x) for x in batches]

    def many(which: int) -> bool:
        return all(close(evaluated(model, batches[which]), expected[which]) for _ in range(30))

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(many, range(3)))
    assert followed(model) == 4


def test_a_thread_that_waits_in_a_pass_does_not_take_what_another_found() -> None:
    model, barrier = with_plans(adapted()), Barrier(2, timeout=20)
    x, before = inputs(), evaluated(model)
    layer = layer_of(model)

    def wait(*_: object) -> None:
        barrier.wait()
        barrier.wait()

    def slow_pass() -> Tensor:
        handle = inner(model).middle.register_forward_pre_hook(wait)
        y = evaluated(model, x)
        handle.remove()
        return y

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(slow_pass)
        barrier.wait()
        with torch.no_grad():
            layer.vectors("default").magnitude.mul_(2)
        inner(model).middle._forward_pre_hooks.clear()
        expected = evaluated(alone(model))
        for _ in range(2):
            assert close(evaluated(model), expected)
        barrier.wait()
        assert close(waiting.result(), expected)
    assert not close(before, expected)


@pytest.mark.usefixtures("hasty_threads")
def test_outputs_are_those_of_one_moment_while_another_thread_writes() -> None:
    model = with_plans(adapted())
    vector = layer_of(model).vectors("default").magnitude
    low, high = vector.detach().clone(), vector.detach() * 2
    expected = []
    for values in (high, low):
        with torch.no_grad():
            vector.copy_(values)
        expected.append(evaluated(alone(model)))
    running = True

    def write() -> None:
        while running:
            for values in (high, low):
                with torch.no_grad():
                    vector.copy_(values)

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        try:
            for _ in range(100):
                found = evaluated(model)
                # Copies of a vector may be taken in the middle of a write, one value old and the next one new.
                assert all(
                    close(column, expected[0][:, index]) or close(column, expected[1][:, index])
                    for index, column in enumerate(found.T)
                )
        finally:
            running = False
        writing.result()
    assert close(evaluated(model), expected[1])


# Calls within calls.


@every_distribution
def test_a_model_that_calls_itself_follows_changes_in_between(distribution: str) -> None:
    model, x = with_plans(adapted(projection_init=distribution)), inputs(seed=3)
    found = []

    def again(of: nn.Module) -> None:
        found.append(evaluated(model, x))
        with torch.no_grad():
            layer_of(of).vectors("default").lambda_b.mul_(2)
        found.append(evaluated(model, x))

    before = evaluated(alone(model), x)
    with in_the_middle(model, again):
        outer = evaluated(model)
    assert close(found[0], before)
    assert close(found[1], evaluated(alone(model), x))
    assert not close(found[1], found[0])
    assert close(outer, evaluated(alone(model)))
    assert current_pass() is None
    assert followed(model) == 4


def test_a_base_layer_that_calls_its_model_gets_the_outputs_of_both() -> None:
    model, x, found = with_plans(adapted()), inputs(seed=3), []

    def again(*_: object) -> None:
        if not found:
            found.append(None)
            found[0] = evaluated(model, x)

    handle = layer_of(model, "lin1").base_layer.register_forward_hook(again)
    outer = evaluated(model)
    handle.remove()
    assert close(outer, evaluated(alone(model)))
    assert close(found[0], evaluated(alone(model), x))


def test_a_base_layer_that_trains_its_own_layer_leaves_no_plan() -> None:
    model, layers = adapted().eval(), []
    layer = layer_of(model)

    def train(*_: object) -> None:
        if not layers:
            layers.append(layer)
            with torch.enable_grad():
                layer(inputs()).sum().backward()

    handle = layer.base_layer.register_forward_hook(train)
    found = evaluated(model)
    handle.remove()
    assert layer.adapted("default").kept.evaluated is None
    assert close(found, evaluated(alone(model)))
    assert followed(model) == 3
    assert followed(model) == 4


def test_another_model_within_a_model_has_plans_of_its_own() -> None:
    outer, within, x = with_plans(adapted()), with_plans(adapted(r=2)), inputs(seed=3)
    expected = evaluated(alone(outer)), evaluated(alone(within), x)
    found = []
    with watched() as ways, in_the_middle(outer, lambda _: found.append(evaluated(within, x))):
        found.append(evaluated(outer))
    assert ways.followed == 8
    assert close(found[0], expected[1])
    assert close(found[1], expected[0])


# Exceptions.


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_a_pass_that_raises_leaves_nothing_to_the_next(raised: type[BaseException]) -> None:
    model = with_plans(adapted())

    def stop(_: nn.Module) -> None:
        raise raised

    with in_the_middle(model, stop), pytest.raises(raised):
        evaluated(model)
    for index in range(3):
        with torch.no_grad():
            layer_of(model).vectors("default")[index].data.mul_(1.5)
        assert close(evaluated(model), evaluated(alone(model)))
    assert followed(model) == 4
    assert current_pass() is None


def test_a_base_that_raises_leaves_the_plan_as_it_was() -> None:
    model, x = with_plans(adapted()), inputs()
    with pytest.raises(RuntimeError, match="shapes"):
        evaluated(model, x[:, :5])
    assert close(evaluated(model), evaluated(alone(model)))
    assert followed(model) == 4


# Copies.


@every_distribution
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_no_plans_and_makes_its_own(copied: Callable[[PeftModel], PeftModel], distribution: str) -> None:
    model = with_plans(adapted(projection_init=distribution))
    before, made = evaluated(model), copied(model)
    with watched() as ways:
        assert close(evaluated(made), before)
    assert ways.slowly == LAYERS
    assert followed(made) == 4
    train_vectors(made, seed=3)
    assert close(evaluated(made), evaluated(alone(made)))
    assert not close(evaluated(made), before)
    assert followed(model) == 4
    assert torch.equal(evaluated(model), before)


# Memory.


def held(model: PeftModel, name: str = "default") -> dict[str, weakref.ref[object]]:
    """What must go with an adapter, and with its model."""
    layer = layer_of(model)
    adapted_weight = layer.adapted(name)
    entry = adapted_weight.kept.evaluated
    assert entry.plan is not None
    found: dict[str, object] = {
        "adapted weight": adapted_weight,
        "norms": adapted_weight.w,
        "factors": entry.factors.packed.constant,
        "plan's function": entry.plan.prepared._add,
        **{f"vector {index}": vector for index, vector in enumerate(layer.vectors(name))},
    }
    return {key: weakref.ref(value) for key, value in found.items()}


def alive(references: dict[str, weakref.ref[object]]) -> list[str]:
    return [key for key, reference in references.items() if reference() is not None]


@pytest.mark.usefixtures("uncollected")
@every_distribution
def test_a_model_takes_everything_with_it(distribution: str) -> None:
    model = with_plans(adapted(projection_init=distribution))
    layer = layer_of(model)
    references = held(model)
    whole = {"weight": layer.base_layer.weight, "projections": layer.adapted("default").shared, "layer": layer}
    references.update({name: weakref.ref(value) for name, value in whole.items()})
    del layer, whole
    assert len(alive(references)) == len(references)
    del model
    assert alive(references) == []


@pytest.mark.usefixtures("uncollected")
@every_distribution
def test_a_deleted_adapter_is_freed_by_the_next_passes(distribution: str) -> None:
    model = with_plans(adapted(TWO, projection_init=distribution))
    references = held(model)
    assert len(alive(references)) == len(references)
    model.set_adapter("second")
    model.delete_adapter("default")
    for _ in range(2):
        assert close(evaluated(model), evaluated(alone(model)))
    assert alive(references) == []
    assert followed(model) == 4


@pytest.mark.usefixtures("uncollected")
@every_distribution
def test_the_only_adapter_is_freed_by_the_next_passes_too(distribution: str) -> None:
    model = with_plans(adapted(projection_init=distribution))
    references = held(model)
    references["projections"] = weakref.ref(layer_of(model).adapted("default").shared)
    base = inner(model)
    model.delete_adapter("default")
    for _ in range(2):
        evaluated(base)
    assert alive(references) == []


@pytest.mark.usefixtures("uncollected")
@every_distribution
def test_what_is_replaced_is_freed_at_once(distribution: str) -> None:
    model = with_plans(adapted(projection_init=distribution))
    layer = layer_of(model)
    weight, bias = weakref.ref(layer.base_layer.weight), weakref.ref(layer.base_layer.bias)
    layer.base_layer = nn.Linear(8, 8)
    assert weight() is None
    assert bias() is None
    entry = weakref.ref(layer.adapted("default").kept.evaluated.plan.prepared._add)
    train_vectors(model, seed=4)
    for _ in range(2):
        evaluated(model)
    assert entry() is None


@pytest.mark.usefixtures("uncollected")
def test_training_frees_what_evaluation_planned() -> None:
    model = with_plans(adapted())
    add = weakref.ref(layer_of(model).adapted("default").kept.evaluated.plan.prepared._add)
    trained(model)
    train_vectors(model, seed=4)
    for _ in range(2):
        evaluated(model)
    assert add() is None


@pytest.mark.usefixtures("uncollected")
def test_inputs_and_what_was_made_of_them_are_freed_after_the_pass() -> None:
    model, x = with_plans(adapted()), randn(5, 8, seed=1)
    seen: list[weakref.ref[Tensor]] = [weakref.ref(x)]
    for _, layer in dvora_layers(model):
        layer.register_forward_hook(lambda _, args, y: seen.extend(map(weakref.ref, (args[0], y))))
        layer.register_forward_hook(lambda *_: seen.append(weakref.ref(current_pass().projected.z)))
    assert followed(model, x) == 4
    del x
    assert len(seen) == 13
    assert all(reference() is None for reference in seen)


def test_a_base_whose_hook_flattens_its_outputs_gives_what_it_gave() -> None:
    model, x = adapted().eval(), inputs().view(1, 5, -1)
    for _, layer in dvora_layers(model):
        layer.base_layer.register_forward_hook(lambda _, __, y: y.flatten(0, -2))
    layer = layer_of(model)
    expected = evaluated(alone(model), x)
    for _ in range(3):
        assert close(evaluated(model, x), expected)
    assert layer.adapted("default").kept.evaluated.plan is not None
