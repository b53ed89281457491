"""An adapter of PEFT's VeRA becomes a DVoRA adapter with the same outputs and merged weights, in any process."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig, SharedProjections
from dvora.peft.conversion import from_vera
from tests.peft.convert.fresh_process import run_fresh
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs

# PEFT warns of what this very conversion checks, and of GPT-2's layout.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]


def vera(base: nn.Module, targets: list[str] | str, **settings: object) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), VeraConfig(**{"r": 6, "target_modules": targets, **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() <= 3e-6 * expected.norm()


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_outputs_and_merged_weights(name: str, save_projection: bool, tmp_path: Path) -> None:
    base = MODELS[name]()
    trained = vera(base, LAYERS[name], save_projection=save_projection, projection_prng_key=7)
    trained.save_pretrained(tmp_path / "vera")
    read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "vera").eval()
    (tmp_path / "dvora").mkdir()
    from_vera(read).save(tmp_path / "dvora")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "dvora").eval()
    assert (outputs(model) - outputs(base)).abs().max() > 1e-2
    close(outputs(model), outputs(trained))
    merged, expected = model.merge_and_unload(), trained.merge_and_unload()
    for key, value in expected.state_dict().items():
        close(merged.state_dict()[key], value)


def test_the_matrices_are_pefts_bit_for_bit(tmp_path: Path) -> None:
    base = MODELS["mlp"]()
    trained = vera(base, LAYERS["mlp"], projection_prng_key=3)
    from_vera(trained).save(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for name, layer in dvora_layers(model):
        theirs = trained.get_submodule(f"base_model.model.{name}")
        adapted = layer.adapted("default")
        like = torch.empty(0)
        assert torch.equal(adapted.A(like), theirs.vera_A["default"][:, : theirs.in_features])
        assert torch.equal(adapted.B(like), theirs.vera_B["default"][: theirs.out_features])


@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
def test_what_is_trained_beside_the_vectors_comes_along(bias: str, tmp_path: Path) -> None:
    base = MODELS["bert"]()
    trained = vera(base, ["query"], bias=bias, task_type="SEQ_CLS")
    from_vera(trained).save(tmp_path)
    close(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), outputs(trained))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fresh_process_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    from_vera(vera(base, LAYERS[name])).save(tmp_path)
    here = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    fresh = run_fresh(name, tmp_path, tmp_path)
    assert torch.equal(fresh["outputs"], outputs(here))
    assert torch.equal(fresh["merged"], outputs(here.merge_and_unload()))


@pytest.mark.parametrize("save_projection", [True, False])
def test_it_can_be_trained_and_saved_again(save_projection: bool, tmp_path: Path) -> None:
    base = MODELS["mlp"]()
    from_vera(vera(base, ["lin0", "lin1"])).save(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    model.peft_config["default"].save_projection = save_projection
    outputs_before = outputs(model)
    model(torch.ones(2, 10)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-2 * parameter.grad)
    assert not torch.equal(outputs(model), outputs_before)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")), outputs(model))


def test_matrices_of_another_machine_are_refused(tmp_path: Path) -> None:
    trained = vera(MODELS["mlp"](), ["lin0"])
    trained.base_model.vera_B["default"][0, 0] *= 1 + 2**-20
    with pytest.raises(ValueError, match=r"vera_B of the adapter is not what projection_prng_key=0 gives here"):
        from_vera(trained)


def test_matrices_that_were_cast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vera_A of the adapter is not .*torch\.bfloat16"):
        from_vera(vera(MODELS["mlp"](), ["lin0"]).to(torch.bfloat16))


def test_a_machine_that_draws_other_values_refuses_to_load(tmp_path: Path) -> None:
    base = MODELS["mlp"]()
    from_vera(vera(base, ["lin0"])).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"projection_fingerprint": "0123456789abcdef"}))
    with pytest.raises(ValueError, match="this machine's torch draws other values"):
        PeftModel.from_pretrained(base, tmp_path)


def test_merged_adapters_and_other_methods_are_refused() -> None:
    model = vera(MODELS["mlp"](), ["lin0"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="lin0: the adapter is merged"):
        from_vera(model)
    lora = get_peft_model(MODELS["mlp"](), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(TypeError, match="expected an adapter of PEFT's VeRA"):
        from_vera(lora)


def test_a_layer_larger_than_the_matrices_is_refused_before_the_model_changes() -> None:
    base = MODELS["mlp"]()
    config = DVoRAConfig(r=4, target_modules=["lin1"], projection_init="peft_vera(r=4, in=20, out=24)")
    with pytest.raises(ValueError, match="rank 4 for at most 20 inputs; this layer needs rank 4 and 24"):
        get_peft_model(base, config)
    assert type(base.lin1) is nn.Linear


@pytest.mark.parametrize("sizes", ["r=4, in=0, out=24", "r=4, in=20", "r=90000, in=90000, out=90000"])
def test_sizes_that_are_none_are_refused(sizes: str) -> None:
    with pytest.raises(ValueError, match="unknown distribution"):
        SharedProjections(0, f"peft_vera({sizes})")
