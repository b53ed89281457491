"""Batches with an adapter a row in several threads at once, and calls within calls: every call has its own names."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.layer_cases import CASES
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

BASE = "__base__"
BATCHES: list[list[str] | None] = [["default"] * 4, ["second", BASE, "second", BASE], [BASE] * 4, None]
"""Of adapter names; None is a plain call."""
X = CASES["MultiheadAttention"].inputs()


def adapted(name: str = "bert", **settings: object) -> PeftModel:
    model = get_peft_model(MODELS[name](), DVoRAConfig(r=4, target_modules=LAYERS[name], **settings)).eval()
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=LAYERS[name], **settings))
    for seed, adapter in enumerate(model.peft_config):
        train_vectors(model, adapter, seed)
        if settings:
            with torch.no_grad():
                model.base_model.model.classifier.modules_to_save[adapter].weight.add_(seed)
    return model


def attention() -> PeftModel:
    """A parameter that its module reads, and layers that are called."""
    case = CASES["MultiheadAttention"]
    model = get_peft_model(case.base(), case.config()).eval()
    train_vectors(model)
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["keys"]))
    train_vectors(model, "second", 1)
    return model


def call(model: nn.Module, names: list[str] | None) -> Tensor:
    options = {} if names is None else {"adapter_names": names}
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return outputs(model, **options)
    with torch.no_grad():
        return model(X, **options)


@contextmanager
def meeting_in(model: PeftModel, parties: int) -> Iterator[None]:
    """All threads wait for each other in the first layer of the base model."""
    barrier = threading.Barrier(parties, timeout=20)
    first = next(m for m in model.get_base_model().modules() if not list(m.children()))

    def meet(*_: object) -> None:
        barrier.wait()

    handle = first.register_forward_pre_hook(meet)
    yield
    handle.remove()


@pytest.mark.parametrize("make", [adapted, lambda: adapted(modules_to_save=["classifier"])], ids=["bert", "heads"])
def test_threads_get_the_adapters_that_they_name(make: Callable[[], PeftModel]) -> None:
    model = make()
    expected = [call(model, names) for names in BATCHES]
    with meeting_in(model, len(BATCHES)), ThreadPoolExecutor(len(BATCHES)) as threads:
        for _ in range(3):
            for found, own in zip(threads.map(lambda names: call(model, names), BATCHES), expected, strict=True):
                assert same_bits(found, own)
    assert not any(layer._forward_pre_hooks for _, layer in dvora_layers(model))


@pytest.mark.usefixtures("hasty_threads")
def test_a_parameter_that_is_silent_in_one_thread_serves_another() -> None:
    model, batches = attention(), [[BASE] * 4, [BASE, "second"] * 2, None]
    expected = [call(model, names) for names in batches]
    assert not torch.equal(expected[0], expected[2])

    def many(which: int) -> bool:
        return all(same_bits(call(model, batches[which]), expected[which]) for _ in range(40))

    with ThreadPoolExecutor(5) as threads:
        assert all(threads.map(many, [0, 1, 2, 2, 0]))


@pytest.mark.parametrize("inner", BATCHES, ids=str)
def test_a_call_within_a_call_has_its_own_names(inner: list[str] | None) -> None:
    model, found = adapted(), []
    expected, outer = call(model, inner), call(model, ["second"] * 4)

    def within(*_: object) -> None:
        if not found:
            found.append(None)
            found[0] = call(model, inner)

    handle = model.get_base_model().bert.embeddings.register_forward_hook(within)
    assert same_bits(call(model, ["second"] * 4), outer)
    handle.remove()
    assert same_bits(found[0], expected)
