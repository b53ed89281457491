"""One batch in which every row names its adapter."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from dvora import DVoRAConfig
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, inputs, outputs, same_bits, train_vectors

BASE = "__base__"
NAMES = ["default", BASE, "second", "default", "partial", "second"]


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """Two adapters on all of the model's layers, and one on the first kind of layer only."""
    model = get_peft_model(MODELS[name]().to(dtype), DVoRAConfig(r=6, target_modules=LAYERS[name], **options))
    model.add_adapter(
        "second", DVoRAConfig(r=9, target_modules=LAYERS[name], projection_seed=2, direction="weight", **options)
    )
    model.add_adapter("partial", DVoRAConfig(r=4, target_modules=LAYERS[name][:1], **options))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mixed_batch_works_in_half_precision(dtype: torch.dtype) -> None:
    model = adapted("llama", dtype)
    mixed = outputs(model, len(NAMES), adapter_names=NAMES)
    assert mixed.dtype == dtype
    assert worst_difference(mixed, row_by_row(model, NAMES)) < 0.05


def test_the_active_adapter_does_not_matter_to_a_mixed_batch() -> None:
    model = adapted("bert")
    first = outputs(model, len(NAMES), adapter_names=NAMES)
    model.set_adapter("second")
    assert same_bits(outputs(model, len(NAMES), adapter_names=NAMES), first)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_the_base_are_those_of_the_base(name: str) -> None:
    model = adapted(name)
    assert same_bits(outputs(model, adapter_names=[BASE] * 4), outputs(MODELS[name]()))


def test_rows_can_name_different_heads() -> None:
    model = adapted("bert", modules_to_save=["classifier"])
    with torch.no_grad():
        for seed, adapter in enumerate(model.peft_config):
            model.base_model.model.classifier.modules_to_save[adapter].weight.add_(seed)
    mixed = outputs(model, len(NAMES), adapter_names=NAMES)
    assert worst_difference(mixed, row_by_row(model, NAMES)) < 1e-5


def generate(model: PeftModel, rows: int, **options: object) -> Tensor:
    """Six more tokens a row, all different: tiny random models would repeat one whatever the adapter."""
    batch = {k: v for k, v in inputs(model, rows).items() if k != "decoder_input_ids"}
    return model.generate(
        **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, no_repeat_ngram_size=1, **options
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generated_rows_are_those_of_the_adapters_alone(name: str, beams: int) -> None:
    model = adapted(name, torch.float64)
    mixed = generate(model, len(NAMES), num_beams=beams, adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        if adapter == BASE:
            with model.disable_adapter():
                alone = generate(model, len(NAMES), num_beams=beams)
        else:
            model.set_adapter(adapter)
            alone = generate(model, len(NAMES), num_beams=beams)
        assert torch.equal(mixed[row], alone[row]), adapter


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_adapters_of_the_generation_test_do_not_all_generate_the_same(name: str) -> None:
    model = adapted(name, torch.float64)
    texts = set()
    for adapter in model.peft_config:
        model.set_adapter(adapter)
        texts.add(tuple(generate(model, len(NAMES), num_beams=3).flatten().tolist()))
    assert len(texts) == 3


def test_a_name_that_no_adapter_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no adapter is named nobody; there are \['default', 'partial', 'second'\]"):
        outputs(adapted("bert"), adapter_names=["default", "nobody", BASE, "second"])


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_names_than_rows_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"adapter_names has {count} entries, the batch has 4 rows"):
        outputs(adapted("bert"), adapter_names=["default"] * count)


def test_training_on_a_mixed_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inference only; call model.eval\(\) first"):
        outputs(adapted("bert").train(), adapter_names=["default"] * 4)


def test_a_mixed_batch_on_a_merged_model_is_refused() -> None:
    model = adapted("bert")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"cannot be used while adapters are merged \(default\)"):
        outputs(model, adapter_names=["default"] * 4)


def test_no_hook_is_left_behind_even_after_an_error() -> None:
    model = adapted("bert")
    with pytest.raises(ValueError, match="adapter_names has 3 entries"):
        outputs(model, adapter_names=["default"] * 3)
    outputs(model, adapter_names=["default"] * 4)
    assert not any(layer._forward_pre_hooks for _, layer in dvora_layers(model))


def test_active_adapters_of_parameters_serve_no_row_of_a_mixed_batch() -> None:
    case = CASES["MultiheadAttention"]
    model = get_peft_model(case.base(), case.config()).eval()
    train_vectors(model)
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["keys"]))
    train_vectors(model, "second")
    x = case.inputs()
    with torch.no_grad():
        before = model(x)
        mixed = model(x, adapter_names=["__base__", "second", "__base__", "second"])
        assert torch.allclose(mixed[0], case.base()(x[:1])[0], atol=1e-6)
        assert not torch.allclose(mixed[1], case.base()(x[1:2])[0], atol=1e-3)
        assert torch.equal(model(x), before)
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"attn\.in_proj_weight: adapter_names needs a layer"):
            model(x, adapter_names=["__base__"] * 4)
