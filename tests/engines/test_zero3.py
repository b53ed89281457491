"""DeepSpeed ZeRO-3: base weights and vectors in parts, gathered for the passes of their own modules only."""

import importlib.util
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from dvora import DVoRAConfig
from tests.engines import zero3
from tests.engines.processes import refusal, run
from tests.engines.training import STEPS, adapted, assert_trained_as_by_one, batch, train
from tests.peft.layer_cases import CASES as LAYER_CASES
from tests.peft.layer_cases import Case
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, train_vectors

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed (pip install deepspeed)", allow_module_level=True)

CASES: dict[str, tuple[dict[str, object], dict[str, object], bool]] = {
    "every parameter is freed": ({}, {}, False),
    "small ones are kept": ({}, {"stage3_param_persistence_threshold": 100_000}, False),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"], "direction": "weight"}, {}, False),
    "checkpointed": ({}, {}, True),
    "groups": ({"target_modules": ["embed_tokens", *LAYERS["llama"]], "lambda_d_groups": 3}, {}, False),
}
"""Settings of the adapter, those of ZeRO-3, and whether activations are checkpointed."""


def trained() -> dict[str, dict[str, Any]]:
    return {name: trained_in_parts(*case) for name, case in CASES.items()}


def trained_in_parts(settings: dict[str, object], zero: dict[str, object], checkpointed: bool) -> dict[str, Any]:
    model = adapted(**settings)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        model.train()
    engine = zero3.engine(model, **zero)
    layers = [layer for _, layer in dvora_layers(model)]
    sharded = [weight.numel() == 0 for layer in layers for weight in layer.parameters()]
    before = constants(model)
    losses = zero3.train(engine, 0, STEPS)
    kept = all(now is then for now, then in zip(constants(model), before, strict=True))
    return {"losses": losses, "vectors": zero3.vectors(model), "sharded": all(sharded), "kept": kept}


def constants(model: nn.Module) -> list[torch.Tensor]:
    return [layer.adapted("default").w for _, layer in dvora_layers(model)]


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, Any]]]:
    return run(trained, 2)


@pytest.mark.parametrize("case", CASES)
def test_processes_with_parts_train_what_one_does(case: str, found: list[dict[str, dict[str, Any]]]) -> None:
    settings, _, _ = CASES[case]
    ranks = [rank[case] for rank in found]
    losses = [rank["losses"] for rank in ranks]
    assert_trained_as_by_one(adapted(**settings), *(rank["vectors"] for rank in ranks), losses=losses)
    assert all(rank["sharded"] for rank in ranks)
    assert all(rank["kept"] for rank in ranks), "constants were made again"


CALLED = ["Linear, weight_norm", "Conv2d, groups, reflect", "embedding and lm_head, tied", "Linear, magnitude only"]
READ = ["MultiheadAttention", "experts (E, out, in)"]


GROUPS = (1, 3)


def every_way_to_hold_a_weight() -> dict[tuple[str, int], tuple[float, float] | str]:
    """How far outputs and gradients are from those of the whole model, or what refuses it, by layer type and groups."""
    return {(name, groups): differences(LAYER_CASES[name], groups) for name in (*CALLED, *READ) for groups in GROUPS}


def differences(case: Case, groups: int) -> tuple[float, float] | str:
    model, x = get_peft_model(case.base(), case.config(lambda_d_groups=groups)).eval(), case.inputs()
    train_vectors(model)
    expected = model(x)
    expected.square().mean().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()
    engine = zero3.engine(model)
    try:
        found = engine(x)
    except ValueError as error:
        return str(error)
    engine.backward(found.square().mean())
    reduced = {name: zero3.gradient(parameter) for name, parameter in trained.items()}
    return (
        float((found - expected).detach().abs().max()),
        max(float((reduced[name] - own).abs().max() / own.abs().max()) for name, own in gradients.items()),
    )


def test_layers_that_are_called_work_in_parts_and_parameters_that_are_read_are_refused() -> None:
    found = run(every_way_to_hold_a_weight, 2)[0]
    for case in product(CALLED, GROUPS):
        outputs, gradients = found[case]
        assert outputs < 1e-5, case
        assert gradients < 1e-4, case
    for case in product(READ, GROUPS):
        assert "is read by its module, and DeepSpeed ZeRO-3 hands it the unadapted weight" in found[case]


def life_of_a_divided_base(folder: str) -> dict[str, Any]:
    """Adapts a base that was loaded in parts, trains, merges and saves it."""
    gathered = zero3.deepspeed().zero.GatheredParameters
    keeps_transformers_on_zero3 = HfDeepSpeedConfig(zero3.settings())
    base = LlamaForCausalLM.from_pretrained(f"{folder}/base").eval()
    sharded = all(parameter.numel() == 0 for parameter in base.parameters())
    model = get_peft_model(base, DVoRAConfig(r=6, target_modules=LAYERS["llama"]))
    del keeps_transformers_on_zero3
    engine = zero3.engine(model)
    said = {"merge": refusal(model.merge_adapter), "save": refusal(lambda: model.save_pretrained(f"{folder}/wrong"))}
    losses = zero3.train(engine, 0, STEPS)
    expected = outputs(engine)
    everything = list(model.parameters())
    with gathered(everything):
        model.save_pretrained(f"{folder}/adapter", is_main_process=dist.get_rank() == 0)
    with gathered(everything, modifier_rank=0):
        model.merge_adapter()
    merged = outputs(engine)
    said["unmerge"] = refusal(model.unmerge_adapter)
    with gathered(everything, modifier_rank=0):
        model.unmerge_adapter()
    unmerged = outputs(engine)
    return {
        "sharded": sharded,
        "losses": losses,
        "said": said,
        "outputs": expected,
        "merged": merged,
        "unmerged": unmerged,
    }


@torch.no_grad()
def outputs(model: nn.Module) -> np.ndarray:
    return model(input_ids=batch(STEPS)).logits.numpy()


def test_a_base_in_parts_is_adapted_merged_and_saved(tmp_path: Path) -> None:
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    first, second = run(life_of_a_divided_base, 2, str(tmp_path))
    losses = train(adapted())
    for rank in (first, second):
        assert rank["sharded"]
        assert "has partitioned the weight between the processes" in rank["said"]["merge"]
        assert "has partitioned the weight between the processes" in rank["said"]["unmerge"]
        assert "is sharded between the processes" in rank["said"]["save"]
        assert abs(rank["merged"] - rank["outputs"]).max() < 1e-4
        assert (rank["unmerged"] == rank["outputs"]).all()
    for step, loss in enumerate(losses):
        assert (first["losses"][step] + second["losses"][step]) / 2 == pytest.approx(loss, rel=1e-5)
    assert not list((tmp_path / "wrong").glob("*.safetensors"))
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "adapter").eval()
    # In one process base and update may be one product.
    np.testing.assert_allclose(outputs(loaded), first["outputs"], rtol=1e-4, atol=1e-5)
