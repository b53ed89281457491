"""Ctrl-C at any moment of what changes a model: it is as before or as after, and the base's bits are kept."""

import copy
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import dvora
from dvora import DVoRAConfig
from dvora.tuner.layers.mergeable import MergeableLayer
from tests.tuner.interrupting import interrupted_at, steps_of
from tests.tuner.models_compared import assert_unchanged, snapshot, worst_difference
from tests.tuner.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

# PEFT says so at every merge that follows another, here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(Already|All adapters|Adapter cannot):UserWarning")

Act = Callable[[PeftModel], object]


def adapted(names: tuple[str, ...] = ("default", "second"), **settings: object) -> PeftModel:
    """Adapters, the first of them active."""
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"], **settings)).eval()
    for name in names[1:]:
        model.add_adapter(name, DVoRAConfig(r=3, target_modules=LAYERS["mlp"], **settings))
    for seed, name in enumerate(names):
        train_vectors(model, name, seed)
    return model


def with_both(model: PeftModel) -> None:
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])


def within_merged(model: PeftModel) -> None:
    with dvora.merged(model):
        pass


def one_layer(model: PeftModel) -> None:
    model.base_model.model.lin1.merge(adapter_names=["default"])


def nothing(model: PeftModel) -> None:
    pass


MERGES: dict[str, tuple[Act, Act]] = {
    "merge another than the active one": (nothing, lambda model: model.merge_adapter(["second"])),
    "merge on top of another": (
        lambda model: model.merge_adapter(["default"]),
        lambda model: model.merge_adapter(["second"]),
    ),
    "unmerge": (lambda model: model.merge_adapter(["second"]), lambda model: model.unmerge_adapter()),
    "unmerge two merges": (with_both, lambda model: model.unmerge_adapter()),
    "merged": (nothing, within_merged),
    "one layer": (nothing, one_layer),
}
"""What comes before, and what is interrupted."""


def steps(total: int, fuzz: bool, some: int = 30) -> list[int]:
    """All of them, or some: spread over the action, and the last ones, where it ends or is undone."""
    return sorted({*range(0, total, 1 if fuzz else max(1, total // some)), *range(max(0, total - 25), total)})


def weights_of(model: nn.Module) -> list[Tensor]:
    return [layer.unmerged().clone() for _, layer in dvora_layers(model)]


@pytest.mark.parametrize("name", MERGES)
def test_an_interrupted_merge_is_as_before_or_as_after_and_can_be_unmerged(name: str, pytestconfig: object) -> None:
    fuzz = pytestconfig.getoption("--fuzz")
    prepare, act = MERGES[name]
    model, prepared = adapted(), adapted()
    prepare(prepared)
    before, unmerged, own = outputs(prepared), outputs(model), snapshot(model)
    after = copy.deepcopy(prepared)
    act(after)
    ends = [before, outputs(after)]
    for step in steps(steps_of(act, copy.deepcopy(prepared), fuzz), fuzz):
        stopped = copy.deepcopy(prepared)
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(step, act, stopped, fuzz)
        assert any(worst_difference(outputs(stopped), end) < 1e-6 for end in ends), step
        assert {tuple(layer.merged_adapters) for _, layer in dvora_layers(stopped)} <= {
            *(tuple(layer.merged_adapters) for _, layer in dvora_layers(prepared)),
            *(tuple(layer.merged_adapters) for _, layer in dvora_layers(after)),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stopped.unmerge_adapter()
        assert_unchanged(stopped, own)
        assert same_bits(outputs(stopped), unmerged)


@pytest.mark.parametrize("call", range(0, 9, 2))
def test_who_meets_a_merge_that_was_interrupted_twice_takes_it_back(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before, own, bits = outputs(model), snapshot(model), weights_of(model)
    calls, settle = 0, MergeableLayer.settle

    def interrupted(layer: MergeableLayer) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise KeyboardInterrupt
        settle(layer)

    def stop(*_: object) -> None:
        monkeypatch.setattr(MergeableLayer, "settle", interrupted)
        raise KeyboardInterrupt

    monkeypatch.setattr("dvora.tuner.merging.warn_of_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter(["second"])
    monkeypatch.undo()
    twins = [copy.deepcopy(model) for _ in range(3)]
    assert all(torch.equal(layer.unmerged(), bit) for (_, layer), bit in zip(dvora_layers(model), bits, strict=True))
    assert same_bits(outputs(model), before)
    assert_unchanged(twins[0], own)  # whose `state_dict` is the first to ask
    twins[1].merge_adapter(["second"])
    twins[1].unmerge_adapter()
    assert_unchanged(twins[1], own)
    twins[2].double()
    assert worst_difference(outputs(twins[2]), before) < 1e-6


def test_another_thread_does_not_take_back_what_may_be_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    errors: list[str] = []

    def serve() -> None:
        try:
            outputs(model)
        except RuntimeError as error:
            errors.append(str(error))

    def stop(*_: object) -> None:
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()

    monkeypatch.setattr("dvora.tuner.merging.warn_of_losses", stop)
    model.merge_adapter(["second"])
    assert len(errors) == 1
    assert "another thread is merging" in errors[0]
    serve()
    assert len(errors) == 1


def test_an_interrupted_merge_and_unload_is_as_before_or_unloaded(pytestconfig: object) -> None:
    fuzz = pytestconfig.getoption("--fuzz")
    model = adapted()
    before, own = outputs(model), snapshot(model)
    with torch.no_grad():
        expected = outputs(copy.deepcopy(model).merge_and_unload(adapter_names=["second"]))

    def act(model: PeftModel) -> object:
        return model.merge_and_unload(adapter_names=["second"])

    for step in steps(steps_of(act, copy.deepcopy(model), fuzz), fuzz):
        stopped = copy.deepcopy(model)
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(step, act, stopped, fuzz)
        if any(True for _ in dvora_layers(stopped)):
            assert same_bits(outputs(stopped), before), step
            assert_unchanged(stopped, own)
        else:
            assert same_bits(outputs(stopped.base_model.model), expected)


@pytest.mark.parametrize("settings", [{}, {"bias": "dvora_only"}], ids=["vectors", "biases too"])
def test_an_interrupted_hot_swap_is_as_before_or_as_after(
    tmp_path: Path, pytestconfig: object, settings: dict[str, object]
) -> None:
    fuzz = pytestconfig.getoption("--fuzz")
    other = adapted(("default",), strength={"lin1": 0.5}, **settings)
    train_vectors(other, "default", 7)
    other.save_pretrained(tmp_path, selected_adapters=["default"])
    model = adapted(("default",), **settings)
    after = copy.deepcopy(model)

    def act(model: PeftModel) -> None:
        dvora.hotswap_adapter(model, tmp_path)

    act(after)
    ends = [(outputs(each), each.peft_config["default"].strength) for each in (model, after)]
    total = steps_of(act, copy.deepcopy(model), fuzz)
    for step in steps(total, fuzz, some=25):
        stopped = copy.deepcopy(model)
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(step, act, stopped, fuzz)
        found = outputs(stopped), stopped.peft_config["default"].strength
        assert any(same_bits(found[0], end[0]) and found[1] == end[1] for end in ends), step


def summed(model: PeftModel) -> None:
    model.base_model.interpolate_adapters("default", "default", 0.5, "third")


ADDED: dict[str, Act] = {
    "add_adapter": lambda model: model.add_adapter("third", DVoRAConfig(r=5, target_modules=["lin0", "lin2"])),
    "add to a merged model": lambda model: (
        model.merge_adapter(["second"]),
        model.add_adapter("third", DVoRAConfig(r=5, target_modules=["lin0", "lin2"])),
    ),
    "interpolate": summed,
}


@pytest.mark.parametrize("name", ADDED)
def test_an_adapter_that_was_interrupted_is_absent_or_whole(name: str, pytestconfig: object) -> None:
    fuzz, act = pytestconfig.getoption("--fuzz"), ADDED[name]
    model = adapted()
    own, after = snapshot(model), copy.deepcopy(model)
    act(after)
    whole = snapshot(after)
    for step in steps(steps_of(act, copy.deepcopy(model), fuzz), fuzz):
        stopped = copy.deepcopy(model)
        with pytest.raises(KeyboardInterrupt) as caught:
            interrupted_at(step, act, stopped, fuzz)
        if caught.traceback[-2].frame.code.name == "inject_adapter" and caught.traceback[-2].relline < 3:
            continue  # PEFT has entered the name, and we have not begun
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stopped.unmerge_adapter()
        assert_unchanged(stopped, whole if "third" in stopped.peft_config else own)
        if "third" not in stopped.peft_config:
            assert stopped.base_model.targeted_module_names == model.base_model.targeted_module_names
            act(stopped)
            assert_unchanged(stopped, whole)


def test_a_base_whose_first_adapter_was_interrupted_is_itself(pytestconfig: object) -> None:
    fuzz, base = pytestconfig.getoption("--fuzz"), MODELS["mlp"]()
    own = snapshot(base)

    def act(model: nn.Module) -> object:
        return get_peft_model(model, DVoRAConfig(r=4, target_modules=LAYERS["mlp"]))

    adapted_base = copy.deepcopy(base)
    act(adapted_base)
    whole = snapshot(adapted_base)
    for step in steps(steps_of(act, copy.deepcopy(base), fuzz), fuzz):
        stopped = copy.deepcopy(base)
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(step, act, stopped, fuzz)
        if any(True for _ in dvora_layers(stopped)):  # PEFT has got it whole, and goes on
            assert_unchanged(stopped, whole)
        else:
            assert_unchanged(stopped, own)
            assert "peft_config" not in vars(stopped)


def test_a_layer_that_cannot_be_adapted_leaves_nothing_of_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    own = snapshot(model)
    broken = dict(dvora_layers(model))["lin2"]

    def update_layer(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(broken, "update_layer", update_layer)
    with pytest.raises(MemoryError):
        model.add_adapter("third", DVoRAConfig(r=5, target_modules=LAYERS["mlp"]))
    assert_unchanged(model, own)
    assert set(model.peft_config) == {"default", "second"}


def test_signals_at_random_moments(pytestconfig: object) -> None:
    """As the tests above, with real ones."""
    model, random = adapted(), Random(0)
    own, unmerged = snapshot(model), outputs(model)
    started = time.perf_counter()
    within_merged(model)
    takes = time.perf_counter() - started
    for _ in range(300 if pytestconfig.getoption("--fuzz") else 25):
        delay = random.uniform(0, takes)
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                timer.start()
                within_merged(model)
                timer.join()
                time.sleep(0.01)
            except KeyboardInterrupt:
                timer.join()
            model.unmerge_adapter()
        assert_unchanged(model, own)
        assert same_bits(outputs(model), unmerged)
