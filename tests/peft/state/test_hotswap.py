"""Another adapter's values in the place of a loaded one's."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import dvora
from dvora import DVoRAConfig
from dvora.peft.layer import layers_in
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.state.adapter_files import edit_config, edit_weights
from tests.peft.tiny import LAYERS, MODELS, outputs, same_bits, train_vectors


def trained(seed: int, **settings: object) -> PeftModel:
    config = DVoRAConfig(**{"r": 6, "target_modules": LAYERS["llama"], **settings})
    model = get_peft_model(MODELS["llama"](), config).eval()
    train_vectors(model, seed=seed)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(1, strength={"v_proj": 0.5}).save_pretrained(tmp_path)
    return tmp_path


def test_the_model_answers_as_the_adapter_that_was_swapped_in(folder: Path) -> None:
    model = trained(2)
    parameters = dict(model.named_parameters())
    dvora.hotswap_adapter(model, folder)
    assert same_bits(outputs(model), outputs(PeftModel.from_pretrained(MODELS["llama"](), folder).eval()))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("matrices", ["structured", "kaiming_uniform"])
def test_a_compiled_model_is_not_compiled_again(matrices: str, tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        trained(seed, strength=1 - 0.1 * seed, projection_init=matrices).save_pretrained(folder)
    compilations = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    torch.compiler.reset()
    model = trained(9, projection_init=matrices)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    outputs(compiled)
    assert len(compilations) == 1
    for folder in folders:
        dvora.hotswap_adapter(compiled, folder)
        expected = outputs(PeftModel.from_pretrained(MODELS["llama"](), folder).eval())
        assert torch.allclose(outputs(compiled), expected, atol=1e-5)
    model.set_strength(0.0)
    with model.disable_adapter():
        base = outputs(model)
    assert torch.allclose(outputs(compiled), base, atol=1e-6)
    assert len(compilations) == 1


def test_an_optimizer_keeps_hold_of_the_vectors(folder: Path) -> None:
    model = trained(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    dvora.hotswap_adapter(model, folder)
    before = outputs(model)
    outputs_with_gradient = model(input_ids=torch.arange(3, 9)[None]).logits
    outputs_with_gradient.square().mean().backward()
    optimizer.step()
    assert not torch.equal(outputs(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, "rank 5, scaling 1.0 here and out_features 32, rank 6"),
        ({"alpha": 3.0}, "scaling 0.5 here and out_features 32, rank 6, scaling 1.0 there"),
        ({"direction": "weight"}, "direction is 'weight' here and 'unit' there"),
        ({"projection_seed": 5}, "projection_seed is 5 here and 0 there"),
        ({"projection_init": "kaiming_uniform"}, "projection_init is 'kaiming_uniform'"),
        ({"target_modules": ["q_proj"]}, "down_proj is absent here"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is shape .* here and absent there"),
    ],
)
def test_an_adapter_that_differs_in_more_than_values_is_refused(
    settings: dict[str, object], message: str, folder: Path
) -> None:
    model = trained(2, **settings)
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=message):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)


def test_a_damaged_adapter_is_refused_whole(folder: Path) -> None:
    model = trained(2)
    before = snapshot(model)
    edit_weights(folder, lambda tensors: tensors.popitem())
    with pytest.raises(ValueError, match=r"has vectors .* in the adapter's file, expected magnitude"):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, before)


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    model = trained(2)
    before = snapshot(model)
    edit_config(folder, base_probes={layer.name: [1.0] * 9 for layer in layers_in(model)})
    with pytest.raises(ValueError, match="the base models differ"):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, before)


def test_a_merged_adapter_is_not_overwritten(folder: Path) -> None:
    model = trained(2)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter 'default' is merged into .*; call unmerge_adapter first"):
        dvora.hotswap_adapter(model, folder)


def test_an_adapter_of_another_method_is_refused(tmp_path: Path) -> None:
    get_peft_model(MODELS["llama"](), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"is an adapter of type .*LORA; only DVoRA"):
        dvora.hotswap_adapter(trained(2), tmp_path)


def test_a_name_that_is_not_loaded_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no adapter 'other' in the model of type \w+, only \['default'\]"):
        dvora.hotswap_adapter(trained(2), folder, "other")
