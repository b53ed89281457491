"""Adapters on quantised layers, beside what the table of what works tries on each."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.bases import BASES, FAMILIES, QUANTISED, TRAINABLE, Base, dense_twin, operating_weight, quantised, wide
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import MODELS, dvora_layers, outputs, same_bits, train_vectors

TARGETS = ["lin0", "lin1", "lin2"]


def inputs(base: Base, rows: int = 5) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(base.dtype)


def adapted(kind: str, **options: object) -> PeftModel:
    """A fresh adapter, the model in training mode."""
    config = DVoRAConfig(**{"r": 8, "target_modules": TARGETS, **options})
    return get_peft_model(quantised(wide(), kind), config).train()


def trained(kind: str, **options: object) -> PeftModel:
    model = adapted(kind, **options)
    train_vectors(model)
    return model


def output(model: nn.Module, kind: str, **options: object) -> Tensor:
    with torch.no_grad():
        return model(inputs(BASES[kind]), **options)


def norm_error(model: PeftModel, plain: nn.Module, kind: str, adapter_name: str = "default") -> float:
    """Largest relative error of a fresh magnitude, which is the norm of the weight's row."""
    errors = []
    for name, layer in dvora_layers(model):
        norms = operating_weight(plain.get_submodule(name), kind).norm(dim=1)
        errors.append(float((layer.vectors(adapter_name).magnitude.detach() / norms - 1).abs().max()))
    return max(errors)


@pytest.mark.parametrize("kind", BASES)
def test_the_magnitude_starts_at_the_norms_of_the_weight_that_the_base_multiplies_by(kind: str) -> None:
    assert norm_error(adapted(kind), wide(), kind) < BASES[kind].norm_tolerance


@pytest.mark.filterwarnings("ignore:rows whose norm is tiny compared to their bias")
@pytest.mark.parametrize("kind", [kind for kind, base in BASES.items() if base.compute != torch.float32])
def test_a_bias_far_above_the_weights_does_not_blur_the_norms(kind: str) -> None:
    plain = wide()
    plain.lin0.bias.mul_(64)
    model = get_peft_model(quantised(plain, kind), DVoRAConfig(r=8, target_modules=TARGETS))
    assert norm_error(model, plain, kind) < 2 * BASES[kind].norm_tolerance


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize(
    ("kind", "direction"), [*((kind, "unit") for kind in BASES), *((kind, "weight") for kind in FAMILIES)]
)
def test_a_trained_adapter_gives_the_outputs_of_the_dense_reference(kind: str, direction: str, mode: str) -> None:
    base, model = BASES[kind], trained(kind, direction=direction, alpha=12.0)
    model.train(mode == "training")
    expected = dense_twin(model, wide(), kind)(inputs(base).double())
    tolerance = base.tolerance if mode == "training" else base.eval_tolerance
    assert worst_difference(output(model, kind), expected) < 3 * tolerance


@pytest.mark.parametrize("kind", TRAINABLE)
def test_training_lowers_the_loss_and_leaves_the_base_alone(kind: str) -> None:
    model = adapted(kind)
    target = torch.randn(5, 32, generator=torch.Generator().manual_seed(9)).to(BASES[kind].dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(inputs(BASES[kind])) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with model.disable_adapter():
        assert same_bits(output(model, kind), output(quantised(wide(), kind).train(), kind))


@pytest.mark.parametrize("kind", FAMILIES)
def test_another_quantised_base_is_refused(kind: str, tmp_path: Path) -> None:
    adapted(kind).save_pretrained(tmp_path)
    other = quantised(wide(seed=1), kind).train()
    before = output(other, kind)
    with pytest.raises(ValueError, match=r"lin0: .*another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert same_bits(output(other, kind), before)
    assert not list(dvora_layers(other))


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_dense_weight_is_kept(kind: str) -> None:
    for _, layer in dvora_layers(trained(kind)):
        adapter = [module for name, module in layer.named_modules() if not name.startswith("base_layer")]
        kept = [v for m in adapter for v in (*vars(m).values(), *m.buffers(False), *m.parameters(False))]
        sizes = [value.numel() for value in kept if isinstance(value, Tensor)]
        assert max(sizes) < layer.base_layer.in_features * layer.base_layer.out_features


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_weight_is_read_once(kind: str) -> None:
    base, rows = quantised(wide(), kind).lin0, []
    base.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    get_peft_model(nn.ModuleDict({"lin0": base}), DVoRAConfig(r=8, target_modules=["lin0"]))
    assert sum(rows) < 1.5 * base.in_features


@pytest.mark.parametrize("kind", FAMILIES)
def test_unloading_gives_the_quantised_model_back(kind: str) -> None:
    model = trained(kind).unload()
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in quantised(wide(), kind).named_modules()
    }
    assert same_bits(output(model.train(), kind), output(quantised(wide(), kind).train(), kind))


@pytest.mark.parametrize("kind", ["torchao_int8", "hqq_4bit", "forward_only"])
def test_constants_follow_a_quantised_weight_that_is_loaded(kind: str) -> None:
    model, other = (
        trained(kind),
        get_peft_model(quantised(wide(seed=1), kind), DVoRAConfig(r=8, target_modules=TARGETS)),
    )
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert same_bits(output(other.train(), kind), output(model, kind))


@pytest.mark.parametrize("kind", ["bnb_int8", "torchao_int8", "forward_only"])
def test_a_transformer_of_quantised_layers_equals_its_dense_reference(kind: str) -> None:
    plain = MODELS["bert"]().eval()
    model = get_peft_model(quantised(plain, kind), DVoRAConfig(r=6, target_modules=["query", "value", "dense"]))
    train_vectors(model)
    expected = outputs(dense_twin(model, plain, kind).eval())
    assert worst_difference(outputs(model), expected) < 3 * BASES[kind].eval_tolerance


def test_one_quantised_layer_keeps_all_layers_from_being_merged() -> None:
    plain = wide()
    plain.lin2 = quantised(wide(), "forward_only").lin2
    model = get_peft_model(plain, DVoRAConfig(r=8, target_modules=TARGETS))
    train_vectors(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"^lin2\b"):
        model.merge_adapter()
    assert_unchanged(model, before)


# bitsandbytes rewrites a 4-bit weight in its first eval pass on some CPUs. After that its own dequantisation returns
# garbage, and the layer has no backward any more; on other CPUs these tests check the same outputs and gradients.


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
def test_gradients_pass_through_layers_that_are_not_adapted_after_an_eval_pass(kind: str) -> None:
    model = get_peft_model(quantised(wide(), kind), DVoRAConfig(r=8, target_modules=["lin0"]))
    train_vectors(model)
    expected = gradients(model.train(), inputs(BASES[kind]))
    eval_passes(model, kind)
    again = gradients(model.train(), inputs(BASES[kind]))
    assert again.keys() == expected.keys()
    assert all(same_bits(value, expected[name]) for name, value in again.items())


# The quantised layers of `bases.py` are what the tests take them for.


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("kind", BASES)
def test_a_base_multiplies_by_its_operating_weight(kind: str, mode: str) -> None:
    base, linear, x = BASES[kind], wide().lin0, inputs(BASES[kind])
    layer = quantised(wide(), kind).lin0.train(mode == "training")
    expected = x.double() @ operating_weight(linear, kind).T + linear.bias.to(base.dtype).double()
    tolerance = base.tolerance if mode == "training" else base.eval_tolerance
    assert worst_difference(layer(x), expected) < tolerance


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_weight_is_near_the_original_and_not_the_original(kind: str) -> None:
    weight = wide().lin0.weight.double()
    distance = float((operating_weight(wide().lin0, kind) - weight).norm() / weight.norm())
    assert 1e-4 < distance < 0.15


@pytest.mark.parametrize("kind", BASES)
def test_the_input_gets_its_gradient_where_the_base_is_said_to_be_differentiable(kind: str) -> None:
    layer, x = quantised(wide(), kind).lin0.train(), inputs(BASES[kind]).requires_grad_()
    y = layer(x)
    assert y.requires_grad == (kind in TRAINABLE)
    if y.requires_grad:
        y.sum().backward()
        expected = operating_weight(wide().lin0, kind).sum(0).expand(5, -1)
        assert worst_difference(x.grad, expected) < BASES[kind].tolerance
