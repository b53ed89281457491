"""bitsandbytes rewrites a 4-bit weight in its first eval pass on some CPUs: the adapter must not notice.

After that, bitsandbytes' own dequantisation returns garbage, and the layer has no backward any more, not even in
training mode. On other CPUs nothing is rewritten, and these tests check the same outputs and gradients.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.bases import BASES, dense_twin, quantised, wide
from tests.peft.layers.test_quantised import TARGETS, inputs, norm_error, output, trained
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import dvora_layers, same_bits, train_vectors

KINDS = ["bnb_nf4", "bnb_fp4", "bnb_nf4_bfloat16"]
REPACKED = 8e-3
"""Rewriting rounds the scales of a weight to bfloat16, and what is read back has been quantised once more."""


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    (model(x) * torch.linspace(-1, 2, 5 * 32).to(x.dtype).view(5, 32)).sum().backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def worst_gradient(model: PeftModel, kind: str) -> float:
    """Distance of the gradients of the vectors and of the input to the dense reference's."""
    found = gradients(model, inputs(BASES[kind]))
    twin = dense_twin(model, wide(), kind)
    dense = gradients(twin, inputs(BASES[kind]).double())
    errors = [worst_difference(found["x"], dense["x"])]
    for name, _ in dvora_layers(model):
        for vector in ("magnitude", "lambda_b", "lambda_d"):
            ours = found[f"base_model.model.{name}.dvora_{vector}.default"]
            errors.append(worst_difference(ours, dense[f"{name}.adapters.0.{vector}"]))
    return max(errors)


def eval_passes(model: nn.Module, kind: str) -> None:
    model.eval()
    for _ in range(2):
        output(model, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_constants_are_right_on_a_base_that_ran_before(kind: str) -> None:
    base = quantised(wide(), kind)
    eval_passes(base, kind)
    model = get_peft_model(base, DVoRAConfig(r=8, target_modules=TARGETS))
    assert norm_error(model, wide(), kind) < REPACKED


@pytest.mark.parametrize("kind", KINDS)
def test_constants_of_a_second_adapter_are_right_on_a_model_that_ran_before(kind: str) -> None:
    model = trained(kind)
    eval_passes(model, kind)
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=TARGETS, projection_seed=1))
    assert norm_error(model, wide(), kind, "second") < REPACKED


@pytest.mark.parametrize("kind", KINDS)
def test_eval_passes_change_neither_outputs_nor_gradients_of_training(kind: str) -> None:
    model = trained(kind)
    expected, expected_gradients = output(model, kind), gradients(model, inputs(BASES[kind]))
    eval_passes(model, kind)
    model.train()
    assert same_bits(output(model, kind), expected)
    again = gradients(model, inputs(BASES[kind]))
    assert again.keys() == expected_gradients.keys()
    assert all(same_bits(value, expected_gradients[name]) for name, value in again.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_can_be_trained_in_eval_mode(kind: str) -> None:
    model = trained(kind)
    eval_passes(model, kind)
    assert worst_gradient(model, kind) < max(0.02, 5 * BASES[kind].tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_ran_before_can_be_trained(kind: str) -> None:
    base = quantised(wide(), kind)
    eval_passes(base, kind)
    model = get_peft_model(base, DVoRAConfig(r=8, target_modules=TARGETS)).train()
    train_vectors(model)
    assert worst_gradient(model, kind) < max(0.02, 5 * BASES[kind].tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_layers_that_are_not_adapted_after_an_eval_pass(kind: str) -> None:
    model = get_peft_model(quantised(wide(), kind), DVoRAConfig(r=8, target_modules=["lin0"]))
    train_vectors(model)
    expected = gradients(model.train(), inputs(BASES[kind]))
    eval_passes(model, kind)
    again = gradients(model.train(), inputs(BASES[kind]))
    assert again.keys() == expected.keys()
    assert all(same_bits(value, expected[name]) for name, value in again.items())


@pytest.mark.parametrize("kind", KINDS)
def test_eval_outputs_are_the_same_before_and_after_saving_the_whole_model(kind: str) -> None:
    """Saving makes bitsandbytes undo the rewriting, which rounds."""
    model = trained(kind)
    eval_passes(model, kind)
    before = output(model, kind)
    model.state_dict()
    assert worst_difference(output(model, kind), before) < BASES[kind].eval_tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_of_a_model_that_ran_before_is_the_same(kind: str) -> None:
    model = trained(kind)
    eval_passes(model, kind)
    copied = copy.deepcopy(model)
    for mode in (False, True):
        assert same_bits(output(copied.train(mode), kind), output(model.train(mode), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_unloading_after_eval_passes_gives_a_model_that_runs(kind: str) -> None:
    model = trained(kind)
    eval_passes(model, kind)
    unloaded = model.unload().eval()
    expected = output(quantised(wide(), kind).eval(), kind)
    assert worst_difference(output(unloaded, kind), expected) < BASES[kind].eval_tolerance
