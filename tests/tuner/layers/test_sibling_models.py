"""Query, key and value of whole models read the same inputs: each is projected once."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from dvora import DVoRAConfig, SharedProjections
from dvora.weight.adapted_weight import AdaptedWeight
from tests.tuner.models_compared import worst_difference
from tests.tuner.tiny import MODELS, dvora_layers, gradients, loss, outputs, same_bits, train_vectors

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value"],
    "t5": ["q", "k", "v"],
}
INPUTS = {"llama": 6, "bert": 2, "t5": 8}
"""Tensors that are projected by two blocks: T5's decoders attend to two each."""


def adapted(name: str, **settings: object) -> PeftModel:
    model = get_peft_model(MODELS[name](), DVoRAConfig(**{"r": 6, "target_modules": TARGETS[name], **settings})).eval()
    train_vectors(model)
    return model


def apart(model: PeftModel) -> PeftModel:
    """Every layer gets a pair of equal matrices for itself, so that none can share."""
    for module in list(model.modules()):
        if isinstance(module, AdaptedWeight):
            module.dvora_projections = SharedProjections(module.shared.seed, module.shared.distribution)
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
def test_a_model_projects_every_tensor_once(name: str) -> None:
    model, other = adapted(name), apart(adapted(name))
    with counted(model) as counts:
        found = outputs(model)
    assert counts.total() == INPUTS[name] < len(list(dvora_layers(model)))
    assert same_bits(found, outputs(other))


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_are_those_of_layers_that_share_nothing(name: str) -> None:
    model = adapted(name)
    with counted(model) as counts:
        found = gradients(model)
    assert counts.total() == INPUTS[name]
    expected = gradients(apart(adapted(name)))
    assert found.keys() == expected.keys()
    assert max(worst_difference(found[key], expected[key]) for key in expected) < 1e-5


# transformers 5 has a new name for it, which the older versions that dvora allows do not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_share_in_both_passes(use_reentrant: bool) -> None:
    model = adapted("llama")
    expected = gradients(apart(adapted("llama")))
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with counted(model) as counts:
        found = gradients(model)
    assert counts.total() == 2 * INPUTS["llama"]
    assert max(worst_difference(found[key], expected[key]) for key in expected) < 1e-5


def test_two_adapters_of_one_rank_share_and_of_two_ranks_do_not() -> None:
    for rank, projections in ((6, INPUTS["bert"]), (7, 12)):
        model = adapted("bert")
        model.add_adapter("second", DVoRAConfig(r=rank, target_modules=TARGETS["bert"]))
        train_vectors(model, "second", seed=1)
        model.base_model.set_adapter(["default", "second"])
        with counted(model) as counts:
            found = outputs(model)
        assert counts.total() == projections
        assert same_bits(found, outputs(apart(model)))


def test_adapters_that_are_switched_between_passes_are_not_mixed_up() -> None:
    model = adapted("bert")
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=["value"]))
    train_vectors(model, "second", seed=1)
    found = []
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        found.append(outputs(model))
    other = apart(model)
    for name, y in zip(("default", "second", "default"), found, strict=True):
        other.set_adapter(name)
        assert same_bits(y, outputs(other))


def test_dropout_gives_each_layer_inputs_of_its_own_in_training_only() -> None:
    model = adapted("bert", dvora_dropout=0.5)
    with counted(model) as counts:
        outputs(model)
    assert counts.total() == INPUTS["bert"]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.train()
    with counted(model) as counts:
        outputs(model)
    assert counts.total() == 3 * INPUTS["bert"]


def test_rows_with_adapters_of_their_own_are_not_mixed_up() -> None:
    model = adapted("bert")
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=TARGETS["bert"]))
    train_vectors(model, "second", seed=1)
    names = ["second", "default", "__base__", "second"]
    found = outputs(model, adapter_names=names)
    assert same_bits(found, outputs(apart(model), adapter_names=names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_a_whole_model_changes_nothing(dtype: torch.dtype) -> None:
    found = []
    for model in (adapted("bert"), apart(adapted("bert"))):
        with torch.autocast("cpu", dtype=dtype):
            found.append(outputs(model))
    assert same_bits(*found)


def test_a_model_trains_under_autocast() -> None:
    model = adapted("llama")
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model)
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(worst_difference(found[key], expected[key]) for key in expected) < 0.15


def test_a_compiled_model_is_one_graph() -> None:
    model = adapted("bert")
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert worst_difference(outputs(compiled), outputs(model)) < 1e-5
    torch.compiler.reset()
