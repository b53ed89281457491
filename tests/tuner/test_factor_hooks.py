"""The hooks around an adapted model's forward come with its first adapter and go with the tuner."""

import copy

import pytest
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from dvora import DVoRAConfig
from tests.tuner.towers import CHANGED, LAYERS, tower, trained


def own_hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    )


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_hooks_are_there_once_whatever_is_added_and_gone_after_unloading() -> None:
    base = tower()
    model = get_peft_model(base, DVoRAConfig(r=3, target_modules=LAYERS))
    count = own_hooks(model)
    assert count == 3
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin0"]))
    model.delete_adapter("default")
    model.add_adapter("default", DVoRAConfig(r=5, target_modules=LAYERS))
    assert own_hooks(model) == count
    for unload in (lambda m: m.unload(), lambda m: m.merge_and_unload()):
        made = copy.deepcopy(model)
        trained(made)
        assert own_hooks(unload(made)) == 0
    assert own_hooks(model) == count


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_injecting_twice_adds_hooks_once() -> None:
    model = inject_adapter_in_model(DVoRAConfig(r=3, target_modules=["lin0"]), tower())
    count = own_hooks(model)
    inject_adapter_in_model(DVoRAConfig(r=3, target_modules=[CHANGED]), model, adapter_name="second")
    assert own_hooks(model) == count == 3


@pytest.mark.parametrize("settings", [{"target_modules": ["nothing"]}, {"alpha": -1.0}, {"r": -1}])
def test_an_injection_that_fails_leaves_no_hook(settings: dict[str, object]) -> None:
    base = tower()
    with pytest.raises(ValueError, match=r"."):
        get_peft_model(base, DVoRAConfig(**{"r": 3, "target_modules": LAYERS, **settings}))
    assert own_hooks(base) == 0


def test_an_injection_that_is_interrupted_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tower()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("dvora.tuner.model.add_adapter", "dvora.tuner.model.check_adapter"):
        with monkeypatch.context() as patched:
            patched.setattr(place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                get_peft_model(base, DVoRAConfig(r=3, target_modules=LAYERS))
        assert own_hooks(base) == 0
