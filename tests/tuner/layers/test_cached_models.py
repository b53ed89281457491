"""PEFT models with caches: after any operation they answer as a model made anew, and siblings share projections."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import dvora
from dvora import DVoRAConfig, SharedProjections
from tests.cached_layers import anew
from tests.tuner.models_compared import worst_difference
from tests.tuner.tiny import MODELS, dvora_layers, forward, gradients, loss, outputs, same_bits, train_vectors

LAYERS = ["lin0", "lin1", "lin2"]
Operation = Callable[[PeftModel], object]


def settings(**changed: object) -> DVoRAConfig:
    return DVoRAConfig(**{"r": 4, "target_modules": LAYERS, **changed})


def adapted(seed: int = 0, **changed: object) -> PeftModel:
    """The tiny MLP with two adapters as if trained, the first one active."""
    model = get_peft_model(MODELS["mlp"](), settings(**changed)).eval()
    model.add_adapter("second", settings(**changed))
    for index, name in enumerate(("default", "second")):
        train_vectors(model, name, seed + index)
    return model


def saved(tmp_path: Path, seed: int = 7) -> Path:
    """The folder of another adapter for the same layers."""
    model = get_peft_model(MODELS["mlp"](), settings(strength=0.7))
    train_vectors(model, seed=seed)
    model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def write_strength(model: PeftModel) -> None:
    for _, layer in dvora_layers(model):
        layer.strength("default").fill_(0.4)


def merge_and_unmerge(model: PeftModel) -> None:
    model.merge_adapter()
    outputs(model)
    model.unmerge_adapter()
    train_vectors(model, seed=3)


def merge_the_second(model: PeftModel) -> None:
    model.merge_adapter(["second"])
    outputs(model)
    model.unmerge_adapter()
    model.set_adapter("second")


def use_a_weighted_adapter(model: PeftModel) -> None:
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.vectors("second").lambda_d.copy_(layer.vectors("default").lambda_d)
    model.add_weighted_adapter(["default", "second"], [0.4, 0.9], "third", combination_type="linear")
    model.set_adapter("third")


def use_an_interpolated_adapter(model: PeftModel) -> None:
    model.base_model.interpolate_adapters("default", "second", 0.3, "third")
    model.set_adapter("third")


def switch_there_and_back(model: PeftModel) -> None:
    model.set_adapter("second")
    outputs(model)
    train_vectors(model, "default", seed=5)
    model.set_adapter("default")


def replace_an_adapter(model: PeftModel) -> None:
    model.set_adapter("second")
    model.delete_adapter("default")
    outputs(model)
    model.add_adapter("default", settings(direction="weight"))
    train_vectors(model, "default", seed=6)
    model.set_adapter("default")


def train_the_second(model: PeftModel) -> None:
    model.set_adapter("second")
    model.train()
    loss(model).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    model.eval()


@torch.no_grad()
def write_a_base(model: PeftModel) -> None:
    next(layer for _, layer in dvora_layers(model)).base_layer.weight.mul_(1.5)


def load_everything(model: PeftModel) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


OPERATIONS: dict[str, Operation] = {
    "set_strength": lambda model: model.set_strength(0.3),
    "set_strength of one layer": lambda model: model.set_strength({"lin1": -0.5}),
    "set_adapter": lambda model: model.set_adapter("second"),
    "set_adapter of both": lambda model: model.base_model.set_adapter(["default", "second"]),
    "double": lambda model: model.double(),
    **{f.__name__: f for f in (write_strength, write_a_base, load_everything, train_the_second)},
    **{f.__name__: f for f in (merge_and_unmerge, merge_the_second, switch_there_and_back, replace_an_adapter)},
    **{f.__name__: f for f in (use_a_weighted_adapter, use_an_interpolated_adapter)},
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_evaluation_follows_an_operation(operation: str) -> None:
    model = adapted()
    before = outputs(model)
    outputs(model)
    OPERATIONS[operation](model)
    found = outputs(model)
    assert not same_bits(found, before)
    assert same_bits(found, outputs(anew(model)))


def load_as_third(model: PeftModel, folder: Path) -> None:
    model.load_adapter(str(folder), "third")
    model.set_adapter("third")


def load_over_the_first(model: PeftModel, folder: Path) -> None:
    model.load_adapter(str(folder), "default")
    model.set_strength(0.7)


@pytest.mark.parametrize("load", [dvora.hotswap_adapter, load_as_third, load_over_the_first])
def test_evaluation_follows_values_from_a_file(load: Callable[[PeftModel, Path], object], tmp_path: Path) -> None:
    model, folder = adapted(), saved(tmp_path)
    before = outputs(model)
    load(model, folder)
    found = outputs(model.eval())
    assert not same_bits(found, before)
    assert same_bits(found, outputs(PeftModel.from_pretrained(MODELS["mlp"](), folder).eval()))


def test_rows_with_adapters_of_their_own_use_and_follow_what_each_adapter_keeps() -> None:
    model = adapted()
    names = ["second", "default", "__base__", "second"]
    outputs(model, adapter_names=names)
    layers = [layer for _, layer in dvora_layers(model)]
    kept = [layer.adapted(name).kept.evaluated.factors for layer in layers for name in ("default", "second")]
    outputs(model, adapter_names=names)
    again = [layer.adapted(name).kept.evaluated.factors for layer in layers for name in ("default", "second")]
    assert all(first is second for first, second in zip(kept, again, strict=True))
    train_vectors(model, "second", seed=4)
    assert same_bits(outputs(model, adapter_names=names), outputs(anew(model), adapter_names=names))


def test_a_merged_model_follows_what_was_kept_before_it() -> None:
    model = adapted()
    before = outputs(model)
    model.merge_adapter()
    assert torch.allclose(outputs(model), before, atol=1e-5)
    model.unmerge_adapter()
    assert same_bits(outputs(model), before)


def test_frozen_adapters_pass_gradients_to_their_inputs_from_what_is_kept() -> None:
    model = adapted(inference_mode=True)
    with torch.inference_mode():
        forward(model)
    kept = [layer.adapted("default").kept.evaluated.factors for _, layer in dvora_layers(model)]
    x = torch.ones(2, 10, requires_grad=True)
    model(x).square().sum().backward()
    again = [layer.adapted("default").kept.evaluated.factors for _, layer in dvora_layers(model)]
    assert all(first is second for first, second in zip(kept, again, strict=True))
    fresh_x = torch.ones(2, 10, requires_grad=True)
    anew(model)(fresh_x).square().sum().backward()
    assert torch.equal(x.grad, fresh_x.grad)


# Query, key and value of whole models read the same inputs, and each tensor is projected once.

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value"],
    "t5": ["q", "k", "v"],
}
INPUTS = {"llama": 6, "bert": 2, "t5": 8}
"""Tensors that are projected by two blocks: T5's decoders attend to two each."""


def with_adapter(name: str, **changed: object) -> PeftModel:
    """A tiny model of blocks with an adapter as if trained."""
    model = get_peft_model(MODELS[name](), settings(**{"r": 6, "target_modules": TARGETS[name], **changed})).eval()
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
def test_a_model_projects_every_tensor_once(name: str) -> None:
    model, other = with_adapter(name), anew(with_adapter(name))
    with counted(model) as counts:
        found = outputs(model)
    assert counts.total() == INPUTS[name] < len(list(dvora_layers(model)))
    assert same_bits(found, outputs(other))


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_are_those_of_layers_that_share_nothing(name: str) -> None:
    model = with_adapter(name)
    with counted(model) as counts:
        found = gradients(model)
    assert counts.total() == INPUTS[name]
    expected = gradients(anew(with_adapter(name)))
    assert found.keys() == expected.keys()
    assert max(worst_difference(found[key], expected[key]) for key in expected) < 1e-5


# transformers 5 has a new name for it, which the older versions that dvora allows do not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_share_in_both_passes(use_reentrant: bool) -> None:
    model = with_adapter("llama")
    expected = gradients(anew(with_adapter("llama")))
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with counted(model) as counts:
        found = gradients(model)
    assert counts.total() == 2 * INPUTS["llama"]
    assert max(worst_difference(found[key], expected[key]) for key in expected) < 1e-5


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


def test_adapters_that_are_switched_between_passes_are_not_mixed_up() -> None:
    model = with_adapter("bert")
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=["value"]))
    train_vectors(model, "second", seed=1)
    found = []
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        found.append(outputs(model))
    other = anew(model)
    for name, y in zip(("default", "second", "default"), found, strict=True):
        other.set_adapter(name)
        assert same_bits(y, outputs(other))


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


def test_siblings_of_rows_with_adapters_of_their_own_are_not_mixed_up() -> None:
    model = with_adapter("bert")
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=TARGETS["bert"]))
    train_vectors(model, "second", seed=1)
    names = ["second", "default", "__base__", "second"]
    found = outputs(model, adapter_names=names)
    assert same_bits(found, outputs(anew(model), adapter_names=names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_a_whole_model_changes_nothing(dtype: torch.dtype) -> None:
    found = []
    for model in (with_adapter("bert"), anew(with_adapter("bert"))):
        with torch.autocast("cpu", dtype=dtype):
            found.append(outputs(model))
    assert same_bits(*found)


def test_a_model_trains_under_autocast() -> None:
    model = with_adapter("llama")
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model)
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(worst_difference(found[key], expected[key]) for key in expected) < 0.15


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_is_one_graph() -> None:
    model = with_adapter("bert")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert worst_difference(outputs(compiled), outputs(model)) < 1e-5
