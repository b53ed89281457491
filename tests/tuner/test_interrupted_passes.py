"""Passes that are interrupted, called within others or run in several threads: the next one is clean."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.ops.passes import current_pass
from dvora.tuner.layers.layer import layers_in
from dvora.weight.factor_pass import remove_factor_pass
from tests.tuner.tiny import train_vectors
from tests.tuner.towers import (
    LAYERS,
    Results,
    adapted,
    alone,
    evaluated,
    in_the_middle,
    inner,
    inputs,
    layer_of,
    loss_of,
    tower,
    trained,
)


@pytest.fixture(autouse=True)
def no_pass_is_left() -> Iterator[None]:
    yield
    assert current_pass() is None


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def assert_clean(model: PeftModel) -> None:
    """After values were written that nothing counts, the next passes are those of a model that was made with them."""
    for write in (lambda v: v.data.mul_(1.2), lambda v: v.data.add_(0.1)):
        for name in LAYERS:
            for vector in layer_of(model, name).vectors("default"):
                write(vector)
        close(evaluated(layer_of(model), inputs()), evaluated(layer_of(alone(model)), inputs()))
        close(evaluated(model), evaluated(alone(model)))
        assert trained(model).differ(trained(alone(model))) < 1e-5
        close(evaluated(layer_of(model), inputs()), evaluated(layer_of(alone(model)), inputs()))


def raising(error: type[BaseException]) -> Callable[[object], None]:
    def stop(_: object) -> None:
        raise error

    return stop


def run_until(model: PeftModel, error: type[BaseException], run: Callable[[PeftModel], object]) -> None:
    with in_the_middle(model, raising(error)), pytest.raises(error):
        run(model)


@pytest.mark.parametrize("run", [trained, evaluated])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, StopIteration])
@pytest.mark.parametrize("before", [0, 2])
def test_an_error_in_the_middle_leaves_nothing(
    before: int, error: type[Exception], run: Callable[[PeftModel], object]
) -> None:
    model = adapted()
    for _ in range(before):
        run(model)
    run_until(model, error, run)
    assert current_pass() is None
    assert_clean(model)


@pytest.mark.parametrize("run", [trained, evaluated])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("before", [0, 2])
def test_the_pass_after_an_interruption_is_clean(
    before: int, error: type[BaseException], run: Callable[[PeftModel], object]
) -> None:
    model = adapted()
    for _ in range(before):
        run(model)
    for _ in range(2):
        run_until(model, error, run)
        for name in LAYERS:
            layer_of(model, name).vectors("default").lambda_b.data.mul_(1.2)
        close(evaluated(model), evaluated(alone(model)))
        assert current_pass() is None
    assert_clean(model)


def test_an_error_while_factors_are_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    trained(model)
    with monkeypatch.context() as patched:
        patched.setattr("dvora.weight.factor_pass.row_factors", lambda *_: (_ for _ in ()).throw(MemoryError()))
        # Otherwise those of the last pass would do.
        torch.autograd.graph.increment_version([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(MemoryError):
            model(inputs())
    assert current_pass() is None
    assert_clean(model)


# Calls within calls.

RUNS: dict[str, Callable[[PeftModel], object]] = {
    "with gradients": lambda model: trained_within(model),
    "without": evaluated,
    "in inference mode": torch.inference_mode()(lambda model: model(inputs())),
}


def trained_within(model: PeftModel) -> Tensor:
    with torch.enable_grad():
        y = model(inputs(seed=3))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss_of(y), parameters, allow_unused=True)[0]


@pytest.mark.parametrize("within", RUNS)
@pytest.mark.parametrize("writes", [False, True])
def test_a_hook_may_call_the_model_again(within: str, writes: bool) -> None:
    model = adapted()
    plain = alone(model)

    def again(of: nn.Module) -> None:
        if writes:
            layer_of(of).vectors("default").lambda_b.data.mul_(1.1)
        RUNS[within](of)
        if writes:
            layer_of(of).vectors("default").magnitude.data.mul_(1.1)

    for run in (trained, evaluated, trained):
        results = []
        for each in (plain, model):
            with in_the_middle(each, again):
                results.append(run(each))
        expected, found = results
        if run is trained:
            assert found.differ(expected) < 1e-5
        else:
            close(found, expected)
        assert current_pass() is None
    assert_clean(model)


def test_a_model_that_calls_itself_deep_down_is_clean() -> None:
    model, depth = adapted(), []

    def deeper(of: nn.Module) -> None:
        if len(depth) < 4:
            depth.append(None)
            evaluated(of)

    expected = trained(alone(model))
    for _ in range(2):
        depth.clear()
        with in_the_middle(model, deeper, once=False):
            assert trained(model).differ(expected) < 1e-5
    assert_clean(model)


class Distilled(nn.Module):
    """A student that calls its teacher in the middle."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) - self.teacher(x)


@pytest.mark.parametrize("teacher_trains", [True, False])
def test_a_teacher_within_a_student(teacher_trains: bool) -> None:
    student, teacher = adapted(), adapted()
    train_vectors(teacher, seed=5)
    teacher.requires_grad_(teacher_trains)
    for layer in layers_in(teacher):
        layer.base_layer.requires_grad_(False)
    both = {
        "known": (student, teacher),
        "alone": (alone(student), alone(teacher)),
    }
    for _ in range(3):
        results = {}
        for name, (one, other) in both.items():
            found: list[Tensor] = []
            hook = inner(one).middle.register_forward_hook(lambda _, __, y, o=other, f=found: f.append(o(y)))
            for each in (one, other):
                each.zero_grad()
            y = one(inputs())
            (loss_of(y) + loss_of(found[0])).backward()
            hook.remove()
            gradients = {
                f"{i} {n}": p.grad.clone()
                for i, m in enumerate((one, other))
                for n, p in m.named_parameters()
                if p.grad is not None
            }
            results[name] = Results(outputs=y.detach(), taught=found[0].detach(), **gradients)
        assert results["known"].differ(results["alone"]) < 1e-5
        assert current_pass() is None
        for one, other in both.values():
            for model in (one, other):
                for layer in layers_in(model):
                    layer.vectors("default").lambda_b.data.mul_(1.1)
    assert_clean(student)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_model_within_a_model_that_is_adapted_too() -> None:
    """An adapter over a model with an adapter, as in pipelines of two methods."""
    both = adapted()
    outer = get_peft_model(Distilled(tower(), both), DVoRAConfig(r=3, target_modules=["student.lin0", "student.lin1"]))
    train_vectors(outer, seed=4)
    plain = copy.deepcopy(outer)
    for module in plain.modules():
        remove_factor_pass(module)
    for _ in range(3):
        assert trained(outer).differ(trained(plain)) < 1e-5
    assert current_pass() is None


# Threads.


def each_in_a_thread(run: Callable[[int], object], count: int = 6) -> list[object]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("writes", [False, True])
def test_threads_may_train_and_evaluate_one_model_at_a_time(writes: bool) -> None:
    model = adapted().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = [inputs(seed).double() for seed in range(6)]

    def gradients(of: PeftModel, x: Tensor) -> list[Tensor]:
        own = [p for p in of.parameters() if p.requires_grad]
        return list(torch.autograd.grad(loss_of(of(x)), own))

    for _ in range(3):
        plain = alone(model)
        expected = [(gradients(plain, x), evaluated(plain, x)) for x in batches]

        def run(index: int, expected: list[tuple[list[Tensor], Tensor]] = expected) -> bool:
            x, (grads, y) = batches[index], expected[index]
            for turn in range(12):
                if (turn + index) % 2:
                    torch.testing.assert_close(evaluated(model, x), y)
                else:
                    for found, own in zip(gradients(model, x), grads, strict=True):
                        torch.testing.assert_close(found, own)
                assert current_pass() is None
            return True

        assert all(each_in_a_thread(run))
        if writes:
            for p in parameters:
                p.data.mul_(1.05)
            with torch.no_grad():
                layer_of(model).base_layer.weight.mul_(1.05)


def test_a_pass_that_ends_in_one_thread_goes_on_in_another() -> None:
    model, barrier, seen = adapted(), threading.Barrier(2, timeout=20), []
    trained(model)

    def meet(_: object) -> None:
        barrier.wait()

    def run(index: int) -> None:
        y = model(inputs()) if index else evaluated(model)
        seen.append(current_pass())
        close(y.detach(), expected)

    expected = evaluated(alone(model))
    with in_the_middle(model, meet, once=False):
        each_in_a_thread(run, 2)
    assert seen == [None, None]
