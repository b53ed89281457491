"""What changes a model and is interrupted or fails half-way: the model is as before or as after, the base's bits too.

Interruptions come at lines of the tuner's own code. One that comes while another is being undone is not promised for.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

import dvora
from dvora import DVoRAConfig
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

# PEFT says so at every merge that follows another, here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(Already|All adapters|Adapter cannot):UserWarning")

Act = Callable[[Any], object]
TUNER = str(Path(dvora.__file__).parent / "peft")


def lines_of(act: Act, model: nn.Module, stop: int | None = None) -> int:
    """How many lines of the tuner's files run in an action on a model; Ctrl-C comes at one of them."""
    count = 0

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            if count == stop:
                # A trace that raises is not called again.
                raise KeyboardInterrupt
            count += 1
        return step

    before = sys.gettrace()
    sys.settrace(lambda frame, _, __: step if frame.f_code.co_filename.startswith(TUNER) else None)
    try:
        act(model)
    finally:
        sys.settrace(before)
    return count


def interrupted(act: Act, model: nn.Module, fuzz: bool) -> list[nn.Module]:
    """Copies of a model on which an action was interrupted, each at another line."""
    total, stopped = lines_of(act, copy.deepcopy(model)), []
    for line in range(0, total, 1 if fuzz else max(1, total // 40)):
        stopped.append(copy.deepcopy(model))
        with pytest.raises(KeyboardInterrupt):
            lines_of(act, stopped[-1], line)
    return stopped


@pytest.fixture
def fuzz(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--fuzz"))


def adapted(names: tuple[str, ...] = ("default", "second"), **settings: object) -> PeftModel:
    """Adapters, the first of them active."""
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"], **settings)).eval()
    for name in names[1:]:
        model.add_adapter(name, DVoRAConfig(r=3, target_modules=LAYERS["mlp"], **settings))
    for seed, name in enumerate(names):
        train_vectors(model, name, seed)
    return model


def nothing(model: PeftModel) -> None:
    pass


def with_both(model: PeftModel) -> None:
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])


def within_merged(model: PeftModel) -> None:
    with dvora.merged(model):
        pass


MERGES: dict[str, tuple[Act, Act]] = {
    "merge another than the active one": (nothing, lambda model: model.merge_adapter(["second"])),
    "merge on top of another": (
        lambda model: model.merge_adapter(["default"]),
        lambda model: model.merge_adapter(["second"]),
    ),
    "unmerge two merges": (with_both, lambda model: model.unmerge_adapter()),
    "merged": (nothing, within_merged),
    "one layer": (nothing, lambda model: model.base_model.model.lin1.merge(adapter_names=["default"])),
}
"""What comes before, and what is interrupted."""


@pytest.mark.parametrize("name", MERGES)
def test_an_interrupted_merge_is_as_before_or_as_after_and_can_be_unmerged(name: str, fuzz: bool) -> None:
    prepare, act = MERGES[name]
    model, prepared = adapted(), adapted()
    prepare(prepared)
    unmerged, own, after = outputs(model), snapshot(model), copy.deepcopy(prepared)
    act(after)
    ends = [outputs(prepared), outputs(after)]
    for stopped in interrupted(act, prepared, fuzz):
        assert any(worst_difference(outputs(stopped), end) < 1e-6 for end in ends)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stopped.unmerge_adapter()
        assert_unchanged(stopped, own)
        assert same_bits(outputs(stopped), unmerged)


def test_an_interrupted_merge_and_unload_is_as_before_or_unloaded(fuzz: bool) -> None:
    model = adapted()
    before, own = outputs(model), snapshot(model)
    expected = outputs(copy.deepcopy(model).merge_and_unload(adapter_names=["second"]))
    for stopped in interrupted(lambda of: of.merge_and_unload(adapter_names=["second"]), model, fuzz):
        if any(True for _ in dvora_layers(stopped)):
            assert same_bits(outputs(stopped), before)
            assert_unchanged(stopped, own)
        else:
            assert same_bits(outputs(stopped.base_model.model), expected)


@pytest.mark.parametrize("settings", [{}, {"bias": "dvora_only"}], ids=["vectors", "biases too"])
def test_an_interrupted_hot_swap_is_as_before_or_as_after(
    tmp_path: Path, fuzz: bool, settings: dict[str, object]
) -> None:
    other = adapted(("default",), strength={"lin1": 0.5}, **settings)
    train_vectors(other, "default", 7)
    other.save_pretrained(tmp_path, selected_adapters=["default"])
    model = adapted(("default",), **settings)
    after = copy.deepcopy(model)
    dvora.hotswap_adapter(after, tmp_path)
    ends = [(outputs(each), each.peft_config["default"].strength) for each in (model, after)]
    for stopped in interrupted(lambda of: dvora.hotswap_adapter(of, tmp_path), model, fuzz):
        found = outputs(stopped), stopped.peft_config["default"].strength
        assert any(same_bits(found[0], end[0]) and found[1] == end[1] for end in ends)


ADDED: dict[str, Act] = {
    "add_adapter": lambda model: model.add_adapter("third", DVoRAConfig(r=5, target_modules=["lin0", "lin2"])),
    "interpolate": lambda model: model.base_model.interpolate_adapters("default", "default", 0.5, "third"),
}


@pytest.mark.parametrize("name", ADDED)
def test_an_adapter_that_was_interrupted_is_absent_or_whole(name: str, fuzz: bool) -> None:
    act, model = ADDED[name], adapted()
    own, after = snapshot(model), copy.deepcopy(model)
    act(after)
    whole = snapshot(after)
    for stopped in interrupted(act, model, fuzz):
        layers = [layer for _, layer in dvora_layers(stopped) if "third" in layer.dvora_adapted]
        # PEFT enters the name before the tuner begins.
        if "third" in stopped.peft_config and layers:
            assert_unchanged(stopped, whole)
        else:
            assert_unchanged(stopped, own)
            assert stopped.base_model.targeted_module_names == model.base_model.targeted_module_names


def test_a_base_whose_first_adapter_was_interrupted_is_itself(fuzz: bool) -> None:
    base = MODELS["mlp"]()
    own, whole = snapshot(base), copy.deepcopy(base)

    def act(model: nn.Module) -> object:
        return get_peft_model(model, DVoRAConfig(r=4, target_modules=LAYERS["mlp"]))

    act(whole)
    for stopped in interrupted(act, base, fuzz):
        if any(True for _ in dvora_layers(stopped)):  # PEFT has got it whole, and goes on
            assert_unchanged(stopped, snapshot(whole))
        else:
            assert_unchanged(stopped, own)
            assert "peft_config" not in vars(stopped)


def test_a_layer_that_cannot_be_adapted_leaves_nothing_of_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    own = snapshot(model)

    def update_layer(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dict(dvora_layers(model))["lin2"], "update_layer", update_layer)
    with pytest.raises(MemoryError):
        model.add_adapter("third", DVoRAConfig(r=5, target_modules=LAYERS["mlp"]))
    assert_unchanged(model, own)
    assert set(model.peft_config) == {"default", "second"}
