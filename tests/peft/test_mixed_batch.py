"""One batch in which every row names its adapter, also in several threads and in calls within calls."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import AdapterBank, DVoRAConfig
from tests.peft.dense_weights import DenseModel
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, inputs, outputs, same_bits, train_vectors

BASE = "__base__"


NAMES = ["default", BASE, "second", "default", "partial", "second"]


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """Two adapters on all of the model's layers, and one on the first kind of layer only.

    The second has lambda_d by groups, and so has the third, whose matrices are the first one's.
    """
    model = get_peft_model(MODELS[name]().to(dtype), DVoRAConfig(r=6, target_modules=LAYERS[name], **options))
    second = {"r": 9, "projection_seed": 2, "direction": "weight", "lambda_d_groups": 3}
    model.add_adapter("second", DVoRAConfig(target_modules=LAYERS[name], **second, **options))
    model.add_adapter("partial", DVoRAConfig(r=6, target_modules=LAYERS[name][:1], lambda_d_groups=4, **options))
    for seed, adapter in enumerate(model.peft_config):
        train_vectors(model, adapter, seed)
    return model.eval()


def row_by_row(model: PeftModel, names: list[str]) -> Tensor:
    """The rows of the outputs, each made by a batch for its adapter alone."""
    rows = []
    for row, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                rows.append(outputs(model, len(names))[row])
        else:
            model.set_adapter(name)
            rows.append(outputs(model, len(names))[row])
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_adapted_by_the_adapter_it_names(name: str) -> None:
    model = adapted(name)
    mixed = outputs(model, len(NAMES), adapter_names=NAMES)
    assert worst_difference(mixed, row_by_row(model, NAMES)) < 1e-5
    assert same_bits(outputs(model, adapter_names=[BASE] * 4), outputs(MODELS[name]()))


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_several_numbers_of_groups_are_active_together(name: str) -> None:
    model, active = adapted(name, torch.float64), ["default", "second", "partial"]
    model.base_model.set_adapter(active)
    assert worst_difference(outputs(model), DenseModel(MODELS[name](), model, active)(**inputs(model))) < 1e-11


def test_a_bank_whose_batch_begins_within_the_call_changes_nothing_of_it(tmp_path: Path) -> None:
    adapted("mlp").save_pretrained(tmp_path, selected_adapters=["second"])
    model = adapted("bert")
    expected = outputs(model, len(NAMES), adapter_names=NAMES)
    with AdapterBank(MODELS["mlp"]().eval(), like=tmp_path / "second") as bank, ExitStack() as entered:
        bank.add_folder(tmp_path)

        def ask(*_: object) -> None:
            entered.enter_context(bank.rows(["second"]))

        first = next(layer for _, layer in dvora_layers(model))
        first.register_forward_hook(ask)
        assert same_bits(outputs(model, len(NAMES), adapter_names=NAMES), expected)


def test_rows_follow_an_adapter_that_changes() -> None:
    model = adapted("mlp")
    before = [outputs(model, len(NAMES), adapter_names=NAMES) for _ in range(2)][-1]
    train_vectors(model, "second", seed=4)
    mixed = outputs(model, len(NAMES), adapter_names=NAMES)
    assert worst_difference(mixed, row_by_row(model, NAMES)) < 1e-5
    assert [same_bits(*rows) for rows in zip(before, mixed, strict=True)] == [name != "second" for name in NAMES]


def with_heads() -> PeftModel:
    model = adapted("bert", modules_to_save=["classifier"])
    with torch.no_grad():
        for seed, adapter in enumerate(model.peft_config):
            model.base_model.model.classifier.modules_to_save[adapter].weight.add_(seed)
    return model


def test_rows_can_name_different_heads() -> None:
    model = with_heads()
    mixed = outputs(model, len(NAMES), adapter_names=NAMES)
    assert worst_difference(mixed, row_by_row(model, NAMES)) < 1e-5


def generate(model: PeftModel, rows: int, **options: object) -> Tensor:
    """Six more tokens a row, all different: tiny random models would repeat one whatever the adapter."""
    batch = {k: v for k, v in inputs(model, rows).items() if k != "decoder_input_ids"}
    return model.generate(
        **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, no_repeat_ngram_size=1, **options
    )


# Beams repeat every row, but in an encoder.
@pytest.mark.parametrize(("name", "beams"), [("llama", 1), ("gpt2", 3), ("t5", 3)])
def test_generated_rows_are_those_of_the_adapters_alone(name: str, beams: int) -> None:
    model = adapted(name, torch.float64)
    mixed = generate(model, len(NAMES), num_beams=beams, adapter_names=NAMES)
    alone = {}
    for adapter in model.peft_config:
        model.set_adapter(adapter)
        alone[adapter] = generate(model, len(NAMES), num_beams=beams)
    with model.disable_adapter():
        alone[BASE] = generate(model, len(NAMES), num_beams=beams)
    assert torch.equal(mixed, torch.stack([alone[adapter][row] for row, adapter in enumerate(NAMES)]))
    assert len({tuple(tokens.flatten().tolist()) for tokens in alone.values()}) == 4


REFUSED: dict[str, tuple[Callable[[PeftModel], object], str]] = {
    "an unknown name": (
        lambda m: outputs(m, adapter_names=["default", "nobody", BASE, "second"]),
        r"no adapter is named nobody; there are \['default', 'partial', 'second'\]",
    ),
    "fewer names than rows": (
        lambda m: outputs(m, adapter_names=["default"] * 3),
        "adapter_names has 3 entries, the batch has 4 rows; pass one name a row",
    ),
    "training": (
        lambda m: outputs(m.train(), adapter_names=["default"] * 4),
        r"adapter_names works for inference only; call model\.eval\(\) first",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_batch_leaves_the_model_alone(case: str) -> None:
    act, message = REFUSED[case]
    model = adapted("bert")
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=message):
        act(model)
    assert_unchanged(model, before)
    assert same_bits(outputs(model.eval()), expected)
    assert not any(layer._forward_pre_hooks for _, layer in dvora_layers(model))


def test_a_mixed_batch_on_a_merged_model_is_refused() -> None:
    model = adapted("bert")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"cannot be used while adapters are merged \(default\)"):
        outputs(model, adapter_names=["default"] * 4)


# Threads, and calls within calls: every call has its own names.


BATCHES: list[list[str] | None] = [["default"] * 4, ["second", BASE, "second", BASE], [BASE] * 4, None]
"""Of adapter names; None is a plain call."""

X = CASES["MultiheadAttention"].inputs()


def attention() -> PeftModel:
    """A parameter that its module reads, whose adapter serves no row of a mixed batch, and layers that are called."""
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


@pytest.mark.parametrize("make", [lambda: adapted("bert"), with_heads], ids=["bert", "heads"])
def test_threads_get_the_adapters_that_they_name(make: Callable[[], PeftModel]) -> None:
    model = make()
    expected = [call(model, names) for names in BATCHES]
    with meeting_in(model, len(BATCHES)), ThreadPoolExecutor(len(BATCHES)) as threads:
        for _ in range(3):
            for found, own in zip(threads.map(lambda names: call(model, names), BATCHES), expected, strict=True):
                assert same_bits(found, own)
    assert not any(layer._forward_pre_hooks for _, layer in dvora_layers(model))


def test_a_parameter_that_is_read_serves_no_row_of_the_base() -> None:
    model = attention()
    with torch.no_grad():
        base = CASES["MultiheadAttention"].base()(X)
    assert torch.allclose(call(model, [BASE] * 4), base, atol=1e-6)
    served = [
        not torch.allclose(*rows, atol=1e-3) for rows in zip(call(model, [BASE, "second"] * 2), base, strict=True)
    ]
    assert served == [False, True, False, True]


@pytest.mark.parametrize("inner", [BATCHES[1], None], ids=str)
def test_a_call_within_a_call_has_its_own_names(inner: list[str] | None) -> None:
    model, found = adapted("bert"), []
    expected, outer = call(model, inner), call(model, ["second"] * 4)

    def within(*_: object) -> None:
        if not found:
            found.append(None)
            found[0] = call(model, inner)

    handle = model.get_base_model().bert.embeddings.register_forward_hook(within)
    assert same_bits(call(model, ["second"] * 4), outer)
    handle.remove()
    assert same_bits(found[0], expected)


class Twice(nn.Module):
    """Calls a layer without gradients and with them, as a model does that looks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            ahead = self.layer(x)
        return self.layer(x) + ahead


def test_what_is_kept_for_a_call_does_not_cut_gradients_off() -> None:
    model = get_peft_model(Twice(), DVoRAConfig(r=4, target_modules=["layer"])).eval()
    model(torch.ones(2, 10), adapter_names=["default", BASE]).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
