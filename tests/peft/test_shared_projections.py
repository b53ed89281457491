"""Query, key and value of whole models read the same inputs, and each tensor is projected once."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from dvora import DVoRAConfig, SharedProjections
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import MODELS, dvora_layers, gradients, outputs, same_bits, train_vectors
from tests.peft.towers import anew

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value"],
    "t5": ["q", "k", "v"],
}
INPUTS = {"llama": 6, "bert": 2, "t5": 8}
"""Tensors that are projected by two blocks: T5's decoders attend to two each."""


def with_adapter(name: str, **changed: object) -> PeftModel:
    """A tiny model of blocks with an adapter as if trained."""
    config = DVoRAConfig(**{"r": 6, "target_modules": TARGETS[name], **changed})
    model = get_peft_model(MODELS[name](), config).eval()
    train_vectors(model)
    return model


@contextmanager
def counted(model: PeftModel) -> Iterator[Counter[int]]:
    """Counts the projections of each width."""
    counts: Counter[int] = Counter()
    (shared,) = {module for module in model.modules() if isinstance(module, SharedProjections)}
    project = shared.impl.project

    def counting(x: Tensor, rank: int) -> Tensor:
        counts[rank] += 1
        return project(x, rank)

    shared.impl.project = counting
    yield counts
    del shared.impl.project


@pytest.mark.parametrize("name", TARGETS)
def test_a_model_projects_every_tensor_once_and_changes_nothing_by_it(name: str) -> None:
    model, other = with_adapter(name), anew(with_adapter(name))
    with counted(model) as counts:
        found = outputs(model)
    assert counts.total() == INPUTS[name] < len(list(dvora_layers(model)))
    assert same_bits(found, outputs(other))
    with counted(model) as counts:
        of_model = gradients(model)
    assert counts.total() == INPUTS[name]
    expected = gradients(other)
    assert of_model.keys() == expected.keys()
    assert max(worst_difference(of_model[key], expected[key]) for key in expected) < 1e-5


def test_two_adapters_of_one_rank_share_and_of_two_ranks_do_not() -> None:
    for rank, projections in ((6, INPUTS["bert"]), (7, 12)):
        model = with_adapter("bert")
        model.add_adapter("second", DVoRAConfig(r=rank, target_modules=TARGETS["bert"]))
        train_vectors(model, "second", seed=1)
        model.base_model.set_adapter(["default", "second"])
        with counted(model) as counts:
            found = outputs(model)
        assert counts.total() == projections
        assert same_bits(found, outputs(anew(model)))


def test_adapters_that_are_switched_between_passes_or_by_row_are_not_mixed_up() -> None:
    model = with_adapter("bert")
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=["value"]))
    train_vectors(model, "second", seed=1)
    switched, names = ("default", "second", "default"), ["second", "default", "__base__", "second"]
    found = [outputs(model)]
    for name in switched:
        model.set_adapter(name)
        found.append(outputs(model))
    found.append(outputs(model, adapter_names=names))
    other = anew(model)
    expected = [outputs(other)]
    for name in switched:
        other.set_adapter(name)
        expected.append(outputs(other))
    expected.append(outputs(other, adapter_names=names))
    assert all(same_bits(*pair) for pair in zip(found, expected, strict=True))


def test_dropout_gives_each_layer_inputs_of_its_own_in_training_only() -> None:
    model = with_adapter("bert", dvora_dropout=0.5)
    with counted(model) as counts:
        outputs(model)
    assert counts.total() == INPUTS["bert"]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.train()
    with counted(model) as counts:
        outputs(model)
    assert counts.total() == 3 * INPUTS["bert"]


def test_a_model_under_autocast() -> None:
    found = []
    for model in (with_adapter("bert"), anew(with_adapter("bert"))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(outputs(model))
    assert same_bits(*found)
