"""What is stopped half-way, by an error or by Ctrl-C at any line, leaves a model as before or as after.

But none during the way back: that is given up. With `--fuzz` at every line, else at ten of each action and its last.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

import dvora
from dvora import DVoRAConfig
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, train_vectors

# PEFT says so at every merge that follows another, here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")

_FOLDER = str(Path(dvora.__file__).parent / "peft")


def lines_of(act: Callable[[Any], object], model: nn.Module, stop: int | None = None) -> int:
    """How many lines of the method's files run in an action on a model; Ctrl-C comes at one of them."""
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
    sys.settrace(lambda frame, _, __: step if frame.f_code.co_filename.startswith(_FOLDER) else None)
    try:
        act(model)
    finally:
        sys.settrace(before)
    return count


def adapted(*further: str, **settings: object) -> PeftModel:
    """With an adapter that is active, and others."""
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"], **settings)).eval()
    train_vectors(model)
    for seed, name in enumerate(further, 1):
        model.add_adapter(name, DVoRAConfig(r=3, target_modules=LAYERS["mlp"]))
        train_vectors(model, name, seed)
    return model


def two_adapters() -> PeftModel:
    return adapted("second")


def one_merged() -> PeftModel:
    model = adapted("second")
    model.merge_adapter(["default"])
    return model


def with_biases() -> PeftModel:
    return adapted(bias="dvora_only")


# How a model is made, and what is done to it, with the folder of another adapter.
ACTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Path], object]]] = {
    "the first adapter": (
        MODELS["mlp"],
        lambda base, _: get_peft_model(base, DVoRAConfig(r=4, target_modules=LAYERS["mlp"])),
    ),
    "a further adapter": (
        two_adapters,
        lambda model, _: model.add_adapter("third", DVoRAConfig(r=5, target_modules=["lin0", "lin2"])),
    ),
    "strength": (two_adapters, lambda model, _: model.set_strength({"lin0": 0.5, "lin2": 0.2})),
    "hot swap": (with_biases, lambda model, folder: dvora.hotswap_adapter(model, folder)),
    "merge": (two_adapters, lambda model, _: model.merge_adapter(["second"])),
    "merge on top of another": (one_merged, lambda model, _: model.merge_adapter(["second"])),
    "merge and unload": (two_adapters, lambda model, _: model.merge_and_unload(adapter_names=["second"])),
}


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything of a model that one of the actions changes, to the last bit."""
    # PEFT's wrappers stay around what was unloaded.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = dict(dvora_layers(base))
    return {
        "types": {name: type(module) for name, module in base.named_modules()},
        "values": {name: value.numpy().tobytes() for name, value in base.state_dict().items()},
        "trained": [name for name, parameter in base.named_parameters() if parameter.requires_grad],
        "merged": {name: layer.merged_adapters for name, layer in layers.items()},
        "originals": [
            None if layer.original is None else layer.original.numpy().tobytes() for layer in layers.values()
        ],
        "strengths": [float(layer.strength(name)) for layer in layers.values() for name in layer.dvora_adapted],
        "in the configuration": model.peft_config["default"].strength if isinstance(model, PeftModel) else None,
        "outputs": outputs(base).numpy().tobytes(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = adapted(strength={"lin1": 0.5}, bias="dvora_only")
    train_vectors(other, seed=7)
    other.base_model.model.lin0.base_layer.bias.data.add_(1)
    other.save_pretrained(made := tmp_path_factory.mktemp("other"))
    return made


@pytest.mark.parametrize("name", ACTIONS)
def test_what_is_interrupted_is_as_before_or_as_after(name: str, folder: Path, pytestconfig: pytest.Config) -> None:
    make, act = ACTIONS[name]
    act(make(), folder)  # what is compiled or looked up once
    after = make()
    total = lines_of(lambda model: act(model, folder), after)
    ends = [state_of(make()), state_of(after)]
    few, last = range(0, total, max(1, total // 10)), range(max(0, total - 6), total)
    for line in range(total) if pytestconfig.getoption("--fuzz") else sorted({*few, *last}):
        model = make()
        with pytest.raises(KeyboardInterrupt):
            lines_of(lambda model: act(model, folder), model, line)
        assert state_of(model) in ends, line
