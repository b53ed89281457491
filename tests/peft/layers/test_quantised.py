"""Adapters on quantised layers: start, outputs, gradients, training, saving, and adapters among adapters."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.bases import BASES, FAMILIES, QUANTISED, TRAINABLE, Base, dense_twin, operating_weight, quantised, wide
from tests.peft.dense import DenseSum
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import MODELS, dvora_layers, outputs, same_bits, train_vectors

TARGETS = ["lin0", "lin1", "lin2"]
REPACKED_IN_EVAL = [kind for kind in QUANTISED if kind.startswith(("bnb_nf4", "bnb_fp4"))]


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


@pytest.mark.parametrize("kind", BASES)
def test_a_fresh_adapter_is_the_base_to_the_last_bit(kind: str) -> None:
    model, base = adapted(kind), quantised(wide(), kind).train()
    assert same_bits(output(model, kind), output(base, kind))
    model.eval(), base.eval()
    with model.disable_adapter():
        disabled = output(model, kind)
    assert same_bits(output(model, kind), disabled)
    # bitsandbytes chooses other kernels in eval mode that cannot be trained through; an adapted layer may avoid them.
    if kind not in REPACKED_IN_EVAL:
        assert same_bits(disabled, output(base, kind))


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


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if "hidden_bias" not in kind])
def test_the_bias_may_change(kind: str) -> None:
    model, plain = trained(kind), wide()
    with torch.no_grad():
        for layer in (model.base_model.model.lin0.base_layer, plain.lin0):
            layer.bias.add_(1)
    expected = dense_twin(model, plain, kind)(inputs(BASES[kind]).double())
    assert worst_difference(output(model, kind), expected) < 3 * BASES[kind].tolerance


@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_are_those_of_the_dense_reference(kind: str, detach_norm: bool) -> None:
    base, model = BASES[kind], trained(kind, detach_norm=detach_norm)
    twin = dense_twin(model, wide(), kind)
    x = inputs(base).requires_grad_()
    x_twin = x.detach().double().requires_grad_()
    weights = torch.linspace(-1, 2, 5 * 32, dtype=torch.float64).view(5, 32)
    (model(x) * weights.to(base.dtype)).sum().backward()
    (twin(x_twin) * weights).sum().backward()
    assert worst_difference(x.grad, x_twin.grad) < 5 * base.tolerance
    for name, layer in dvora_layers(model):
        dense = twin.get_submodule(name)
        assert isinstance(dense, DenseSum)
        for vector, value in layer.vectors("default")._asdict().items():
            error = worst_difference(value.grad, getattr(dense.adapters[0], vector).grad)
            assert error < 5 * base.tolerance, (name, vector)


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


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind not in TRAINABLE])
def test_training_through_a_base_without_a_backward_is_refused(kind: str) -> None:
    """Its layers would train, with gradients in which every layer above counts through its update only."""
    model = adapted(kind)
    with pytest.raises(RuntimeError, match=r"lin1.*(backward|gradient)"):
        model(inputs(BASES[kind]))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_saved_and_loaded_onto_a_freshly_quantised_base_it_gives_the_same_bits(
    kind: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = trained(kind)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3 * len(TARGETS)
    loaded = PeftModel.from_pretrained(quantised(wide(), kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for mode in (True, False):
        assert same_bits(output(loaded.train(mode), kind), output(model.train(mode), kind))


@pytest.mark.filterwarnings("ignore:the base is not exactly the one that the adapter was made for")
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_moves_between_the_base_and_the_quantised_base(kind: str, tmp_path: Path) -> None:
    plain = get_peft_model(wide(), DVoRAConfig(r=8, target_modules=TARGETS))
    plain.save_pretrained(tmp_path / "plain")
    adapted(kind).save_pretrained(tmp_path / "quantised")
    PeftModel.from_pretrained(quantised(wide(), kind), tmp_path / "plain")
    PeftModel.from_pretrained(wide(), tmp_path / "quantised")


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
def test_rows_of_one_batch_can_name_their_adapters(kind: str) -> None:
    model = trained(kind)
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin0", "lin2"], projection_seed=3))
    train_vectors(model, "second", seed=1)
    model.eval()
    names = ["second", "__base__", "default", "second", "default"]
    rows = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        rows[name] = output(model, kind)
    with model.disable_adapter():
        rows["__base__"] = output(model, kind)
    expected = torch.stack([rows[name][row] for row, name in enumerate(names)])
    mixed = output(model, kind, adapter_names=names)
    assert worst_difference(mixed, expected) < 3 * BASES[kind].eval_tolerance
    assert same_bits(mixed[1], rows["__base__"][1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_deep_copy_is_a_model_of_its_own(kind: str) -> None:
    model = trained(kind)
    before = output(model, kind)
    copied = copy.deepcopy(model)
    assert same_bits(output(copied, kind), before)
    train_vectors(copied, seed=1)
    assert not same_bits(output(copied, kind), before)
    assert same_bits(output(model, kind), before)


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


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_merging_is_refused_by_layer_with_a_way_out_and_nothing_changes(kind: str, merge: str) -> None:
    model = trained(kind)
    before = output(model, kind)
    types = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TypeError, match=r"^lin0\b.*(quantis|forward).*(keep|load|instead)"):
        getattr(model, merge)()
    assert same_bits(output(model, kind), before)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert not any(layer.merged for _, layer in dvora_layers(model))


def test_one_quantised_layer_keeps_all_layers_from_being_merged() -> None:
    plain = wide()
    plain.lin2 = quantised(wide(), "forward_only").lin2
    model = get_peft_model(plain, DVoRAConfig(r=8, target_modules=TARGETS))
    train_vectors(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"^lin2\b"):
        model.merge_adapter()
    assert_unchanged(model, before)


def based_on(kind: str) -> nn.Module:
    return wide() if kind == "float32" else quantised(wide(), kind)


@pytest.mark.parametrize(("trained_on", "loaded_onto"), [("float32", "bnb_nf4"), ("bnb_nf4", "float32")])
def test_an_adapter_of_another_quantisation_says_so(trained_on: str, loaded_onto: str, tmp_path: Path) -> None:
    get_peft_model(based_on(trained_on), DVoRAConfig(r=8, target_modules=TARGETS)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"3 of 3 adapted weights differ, lin\d by about \d+% of its norm"):
        PeftModel.from_pretrained(based_on(loaded_onto), tmp_path)
