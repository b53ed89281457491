"""Passes that are interrupted, called within others, run again or run in several threads: the next one is clean."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dvora import DVoRAConfig
from dvora.factors import current_pass, remove_factor_pass
from dvora.peft.layer import layers_in
from tests.peft.tiny import train_vectors
from tests.peft.towers import (
    CHANGED,
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


def raising(error: type[BaseException]) -> Callable[[object], None]:
    def stop(_: object) -> None:
        raise error

    return stop


@pytest.mark.parametrize("run", [trained, evaluated])
@pytest.mark.parametrize("error", [ValueError, StopIteration, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("before", [0, 2])
def test_the_pass_after_an_error_or_an_interruption_is_clean(
    before: int, error: type[BaseException], run: Callable[[PeftModel], object]
) -> None:
    model = adapted()
    for _ in range(before):
        run(model)
    for _ in range(2):
        with in_the_middle(model, raising(error)), pytest.raises(error):
            run(model)
        for name in LAYERS:
            layer_of(model, name).vectors("default").lambda_b.data.mul_(1.2)
        close(evaluated(model), evaluated(alone(model)))
    assert_clean(model)


def test_an_error_while_factors_are_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    trained(model)
    with monkeypatch.context() as patched:
        patched.setattr("dvora.factors.layer_factors", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            model(inputs())
    assert current_pass() is None
    assert_clean(model)


# The hooks around an adapted model's forward.


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_hooks_are_there_once_whatever_is_added_and_gone_after_unloading() -> None:
    model = get_peft_model(tower(), DVoRAConfig(r=3, target_modules=LAYERS))
    count = hooks_of(model)
    assert count == 3
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin0"]))
    model.delete_adapter("default")
    model.add_adapter("default", DVoRAConfig(r=5, target_modules=LAYERS))
    assert hooks_of(model) == count
    for unload in (lambda m: m.unload(), lambda m: m.merge_and_unload()):
        made = copy.deepcopy(model)
        trained(made)
        assert hooks_of(unload(made)) == 0
    assert hooks_of(model) == count
    injected = inject_adapter_in_model(DVoRAConfig(r=3, target_modules=["lin0"]), tower())
    inject_adapter_in_model(DVoRAConfig(r=3, target_modules=[CHANGED]), injected, adapter_name="second")
    assert hooks_of(injected) == count


@pytest.mark.parametrize("settings", [{"target_modules": ["nothing"]}, {"alpha": -1.0}, {"r": -1}])
def test_an_injection_that_fails_leaves_no_hook(settings: dict[str, object]) -> None:
    base = tower()
    with pytest.raises(ValueError, match=r"."):
        get_peft_model(base, DVoRAConfig(**{"r": 3, "target_modules": LAYERS, **settings}))
    assert hooks_of(base) == 0


# Calls within calls.


def trained_within(model: PeftModel) -> Tensor:
    with torch.enable_grad():
        y = model(inputs(seed=3))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss_of(y), parameters, allow_unused=True)[0]


RUNS: dict[str, Callable[[PeftModel], object]] = {
    "with gradients": trained_within,
    "without": evaluated,
    "in inference mode": torch.inference_mode()(lambda model: model(inputs())),
}


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


@pytest.mark.parametrize("teacher_trains", [True, False])
def test_a_teacher_within_a_student(teacher_trains: bool) -> None:
    student, teacher = adapted(), adapted()
    train_vectors(teacher, seed=5)
    teacher.requires_grad_(teacher_trains)
    for layer in layers_in(teacher):
        layer.base_layer.requires_grad_(False)
    both = {"known": (student, teacher), "alone": (alone(student), alone(teacher))}
    for _ in range(3):
        results = {}
        for name, (one, other) in both.items():
            taught: list[Tensor] = []
            hook = inner(one).middle.register_forward_hook(lambda _, __, y, o=other, f=taught: f.append(o(y)))
            for each in (one, other):
                each.zero_grad()
            y = one(inputs())
            (loss_of(y) + loss_of(taught[0])).backward()
            hook.remove()
            gradients = {
                f"{i} {n}": p.grad.clone()
                for i, m in enumerate((one, other))
                for n, p in m.named_parameters()
                if p.grad is not None
            }
            results[name] = Results(outputs=y.detach(), taught=taught[0].detach(), **gradients)
        assert results["known"].differ(results["alone"]) < 1e-5
        for model in (*both["known"], *both["alone"]):
            for layer in layers_in(model):
                layer.vectors("default").lambda_b.data.mul_(1.1)
    assert_clean(student)


class Pair(nn.Module):
    """Two models beside each other."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) - self.teacher(x)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_model_within_a_model_that_is_adapted_too() -> None:
    outer = get_peft_model(Pair(tower(), adapted()), DVoRAConfig(r=3, target_modules=["student.lin0", "student.lin1"]))
    train_vectors(outer, seed=4)
    plain = copy.deepcopy(outer)
    for module in plain.modules():
        remove_factor_pass(module)
    for _ in range(3):
        assert trained(outer).differ(trained(plain)) < 1e-5


# Parts that run again in the backward pass.


def checkpointed(model: PeftModel, use_reentrant: bool) -> PeftModel:
    """The same model with its second half checkpointed."""
    base = inner(model)

    def first(x: Tensor) -> Tensor:
        return base.middle(torch.tanh(base.lin1(torch.tanh(base.lin0(x)))))

    def second(x: Tensor) -> Tensor:
        return base.lin3(torch.tanh(base.lin2(x)))

    base.forward = lambda x: checkpoint(second, first(x), use_reentrant=use_reentrant)
    return model


both_checkpoints = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
both_ways = pytest.mark.parametrize("rows", [5, 40], ids=["thin", "folded"])


# The evaluation's, of a checkpoint that is not needed there.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@both_checkpoints
@both_ways
def test_a_checkpointed_part_has_the_same_gradients(rows: int, use_reentrant: bool) -> None:
    model, x = adapted(), inputs(rows=rows)
    expected = trained(alone(model), x)
    checkpointed(model, use_reentrant)
    for evaluates in (False, False, True, True):
        model.zero_grad()
        y = model(x)
        if evaluates:
            evaluated(model, x)
        loss_of(y).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert Results(outputs=y.detach(), **found).differ(expected) < 1e-5


@both_checkpoints
@both_ways
def test_the_whole_model_may_be_checkpointed(rows: int, use_reentrant: bool) -> None:
    model = adapted()
    x = inputs(rows=rows).requires_grad_()
    for _ in range(3):
        expected = trained(alone(model), x)
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        loss_of(y).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert Results(outputs=y.detach(), **found).differ(expected) < 1e-5
        for vector in layer_of(model).vectors("default"):
            vector.data.mul_(1.1)


@both_checkpoints
@pytest.mark.parametrize("passes_before", [0, 1, 2])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_part_may_run_again_after_a_later_pass_began(
    order: tuple[int, int], passes_before: int, use_reentrant: bool
) -> None:
    model = adapted()
    plain = alone(model)
    checkpointed(model, use_reentrant)
    for _ in range(passes_before):
        trained(model)
    results = []
    for each in (plain, model):
        each.zero_grad()
        losses = [loss_of(each(inputs(seed))) for seed in (1, 2)]
        for index in order:
            losses[index].backward()
        results.append(Results({n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}))
    assert results[1].differ(results[0]) < 1e-5


# Threads.


def each_in_a_thread(run: Callable[[int], object], count: int = 6) -> list[object]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.usefixtures("hasty_threads")
def test_threads_may_train_and_evaluate_one_model_at_a_time() -> None:
    model = adapted().double()
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
        for p in model.parameters():
            if p.requires_grad:
                p.data.mul_(1.05)
        with torch.no_grad():
            layer_of(model).base_layer.weight.mul_(1.05)


def test_a_pass_that_ends_in_one_thread_goes_on_in_another() -> None:
    model, barrier, seen = adapted(), threading.Barrier(2, timeout=20), []
    trained(model)

    def run(index: int) -> None:
        y = model(inputs()) if index else evaluated(model)
        seen.append(current_pass())
        close(y.detach(), expected)

    expected = evaluated(alone(model))
    with in_the_middle(model, lambda _: barrier.wait(), once=False):
        each_in_a_thread(run, 2)
    assert seen == [None, None]
