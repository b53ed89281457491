"""Every row of a batch is what the merged model of its adapter alone gives: every layer type, dtype and head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertForTokenClassification

import dvora
from dvora.adapter_file.packs import write_pack
from dvora.flat import Layout
from tests.bank.tenants import BERT, HEADED, LLAMA, MLP, NO_MERGE, Served, Tenants, row_by_row, tenants
from tests.peft.bases import BASES, FAMILIES, dense_twin, quantised, wide
from tests.peft.dense_weights import DenseModel
from tests.peft.kinds import Kind, by_groups, edit_config, edit_weights, saved
from tests.peft.layer_cases import CASES, READ
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, bert, inputs, outputs, same_bits, train_vectors

# What PEFT says of an adapter on embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]

CALLED = [name for name, case in CASES.items() if name not in READ and "target_parameters" not in case.settings]
NAMES = ["b", None, "a", "b"]
MIXED = ["c", "a", None, "b", "a", None]
OF_BASE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 6e-3}
OF_BANK = {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 0.025}
"""What roundings of a base and of factor rows take from the outputs of a few layers."""


def check_rows(found: Tensor, these: Tenants, names: list[str | None], tolerance: float) -> None:
    alone = row_by_row(lambda name: outputs(these.alone(name), len(names)), names)
    assert worst_difference(found, alone) < tolerance


def doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@by_groups
@pytest.mark.parametrize("name", CALLED)
def test_rows_of_every_layer_type_are_those_of_the_merged_models(name: str, groups: int, tmp_path: Path) -> None:
    kind = Kind(CASES[name].base, {"r": 5, **CASES[name].settings}).by_groups(groups)
    these, x = tenants(kind, tmp_path, 2), CASES[name].inputs()
    with these.bank() as served:
        found = served(NAMES, x)
        base = served([None] * 4, x)
    alone = row_by_row(lambda each: these.alone(each, name not in NO_MERGE)(doubled(x)).detach(), NAMES)
    assert worst_difference(found, alone) < 1e-5
    assert same_bits(base, these.base()(x))
    assert same_bits(found[1], base[1])


@by_groups
@pytest.mark.parametrize("held", OF_BANK, ids=str)
@pytest.mark.parametrize("dtype", OF_BASE, ids=str)
def test_every_dtype_of_a_base_and_of_a_bank(
    dtype: torch.dtype, held: torch.dtype, groups: int, tmp_path: Path
) -> None:
    these = tenants(HEADED.by_groups(groups), tmp_path, 3, dtype)
    with these.bank(dtype=held) as served:
        found = served(MIXED)
    assert found.dtype == dtype
    check_rows(found, these, MIXED, 2 * OF_BASE[dtype] + OF_BANK[held])
    assert same_bits(found[2], outputs(these.base(), 6)[2])


@by_groups
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_whole_models_are_those_of_the_dense_method(name: str, groups: int, tmp_path: Path) -> None:
    kind = Kind(MODELS[name], {"r": 6, "target_modules": LAYERS[name], "alpha": 3.5, "direction": "weight"})
    these = tenants(kind.by_groups(groups), tmp_path)
    with these.bank() as served:
        found = served(MIXED)
        assert same_bits(served([None] * 6), outputs(these.base(), 6))

    def alone(name: str | None) -> Tensor:
        if name is None:
            return outputs(these.alone(None), 6)
        model = PeftModel.from_pretrained(these.base(), these.path(name))
        return DenseModel(these.base(), model)(**inputs(model, 6)).detach()

    assert worst_difference(found, row_by_row(alone, MIXED)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e9])
@by_groups
def test_half_precision_holds_an_update_however_it_is_written(
    groups: int, size: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    these = tenants(MLP.by_groups(groups), tmp_path, 1)
    with these.bank() as served:
        exact = served(["a"] * 4)
    # The same one, with a small lambda_d and a large lambda_b, or the other way round.
    factor = {"lambda_b": 1 / size, "lambda_d": size}

    def rewrite(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.mul_(factor.get(name.rpartition("dvora_")[2], 1.0))

    edit_weights(these.path("a"), rewrite)
    with these.bank(dtype=dtype) as served:
        assert worst_difference(served(["a"] * 4), exact) < OF_BANK[dtype]


def test_under_autocast_rows_are_rounded_as_the_base_is(tmp_path: Path) -> None:
    these = tenants(LLAMA, tmp_path)
    with these.bank() as served, torch.autocast("cpu", torch.bfloat16):
        found = served(MIXED)
        assert same_bits(served([None] * 6), outputs(these.base(), 6))
    check_rows(found, these, MIXED, 2 * OF_BASE[torch.bfloat16])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lin1"], "magnitude_modules": ["lin0", "lin2"]},
        {"target_modules": ["lin1"], "magnitude_modules": ["lin1"]},
        {"alpha": 3.5, "rank_pattern": {"lin1": 7}, "alpha_pattern": {"lin0": 2.0}, "direction": "weight"},
        {"detach_norm": True, "projection_seed": 5},
        {"dvora_dropout": 0.5},
    ],
    ids=["magnitudes", "magnitudes only", "patterns", "seed", "dropout"],
)
@by_groups
def test_settings_of_adapters(groups: int, settings: dict[str, Any], tmp_path: Path) -> None:
    these = tenants(MLP.by_groups(groups), tmp_path, **settings)
    with these.bank() as served:
        check_rows(served(MIXED), these, MIXED, 1e-5)


def test_adapters_of_one_bank_have_strengths_of_their_own(tmp_path: Path) -> None:
    these = tenants(MLP, tmp_path)
    for name, strength in (("a", 0.0), ("b", 0.25), ("c", {"lin1": 0.5})):
        edit_config(these.path(name), strength=strength)
    model = these.base()
    with dvora.AdapterBank(model, like=these.path("a")) as bank:
        bank.add_folder(tmp_path, allow_unchanged=True)
        found = Served(model, bank)(MIXED)
    check_rows(found, these, MIXED, 1e-5)
    assert same_bits(found[1], outputs(these.base(), 6)[1])


HEADS = {
    "bert classifier": BERT,
    "a head of several modules": BERT._replace(settings={**BERT.settings, "modules_to_save": ["pooler", "classifier"]}),
    "a head on every token": Kind(
        lambda: bert(BertForTokenClassification), {"r": 3, "target_modules": ["query"], "task_type": "TOKEN_CLS"}
    ),
    "two heads": Kind(MODELS["mlp"], {"r": 3, "target_modules": ["lin1"], "modules_to_save": ["lin2", "lin0"]}),
}


@pytest.mark.parametrize("name", HEADS)
def test_rows_have_the_heads_of_their_adapters(name: str, tmp_path: Path) -> None:
    these = tenants(HEADS[name], tmp_path)
    with these.bank() as served:
        found = served(MIXED)
        assert same_bits(served([None] * 6), outputs(these.base(), 6))
    check_rows(found, these, MIXED, 2e-5)


@pytest.mark.parametrize(
    ("how", "like"), [("folder", "pack"), ("file", "folder"), ("vector", "folder"), ("pack", "pack")]
)
@by_groups
def test_every_source_of_an_adapter(groups: int, how: str, like: str, tmp_path: Path) -> None:
    these = tenants(HEADED.by_groups(groups), tmp_path / "folders", 2)
    write_pack(tmp_path / "pack", {"a": these.path("a")})
    model, path = these.base(), these.path("a")
    with dvora.AdapterBank(model, like=these.path("b") if like == "folder" else tmp_path / "pack") as bank:
        assert len(bank) == 0
        if how == "pack":
            assert bank.add_pack(tmp_path / "pack") == ["a"]
        else:
            vector = Layout.of(path).to_vector(path)
            bank.add("a", {"folder": path, "file": path / "adapter_model.safetensors", "vector": vector}[how])
        check_rows(Served(model, bank)(["a"] * 4), these, ["a"] * 4, 1e-5)
        with these.bank() as other:
            assert bank.digest("a") == other.bank.digest("a")


def test_a_partial_adapter_is_the_base_where_it_lacks_layers_and_heads(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path / "whole", 2)
    partial = Kind(MODELS["mlp"], {"r": 4, "target_modules": ["lin1"]})
    saved(partial.trained(3), tmp_path / "partial")
    with these.bank() as served:
        # It may lack layers that its settings do not name, but not the others' head.
        with pytest.raises(
            ValueError, match=r"adapter 'p': the adapter lacks lin2.weight, and 1 of the others' .* in all"
        ):
            served.bank.add("p", tmp_path / "partial")
        served.bank.add("p", tmp_path / "partial", allow_partial=True)
        found = served(["p", "a", "p", None])
    alone = PeftModel.from_pretrained(these.base().double(), tmp_path / "partial").merge_and_unload()
    expected = row_by_row(lambda name: outputs(alone if name == "p" else these.alone(name)), ["p", "a", "p", None])
    assert worst_difference(found, expected) < 1e-5


def test_an_unchanged_adapter_is_the_base_where_that_is_allowed(tmp_path: Path) -> None:
    these = tenants(MLP, tmp_path / "whole", 2)
    saved(MLP.fresh(), tmp_path / "fresh")
    with these.bank() as served:
        served.bank.add("fresh", tmp_path / "fresh", allow_unchanged=True)
        found = served(["fresh", "a", "fresh", None])
    assert same_bits(found[[0, 2, 3]], outputs(these.base())[[0, 2, 3]])


@pytest.mark.parametrize("part", ["dvora_magnitude", "dvora_lambda_b", "lin2.weight"])
def test_an_adapter_that_changes_one_value_is_no_unchanged_one(part: str, tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path / "whole", 1)
    saved(HEADED.fresh(), tmp_path / "changed")

    def change(tensors: dict[str, Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if name.endswith(part)).view(-1)[3] += 0.5

    edit_weights(tmp_path / "changed", change)
    with these.bank() as served:
        served.bank.add("changed", tmp_path / "changed")
        assert not torch.equal(served(["changed"] * 4), served([None] * 4))


def test_what_names_an_adapter_is_its_base_settings_and_values(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path / "whole", 1)
    nudged = these.base()
    nudged.lin1.weight[3, 4].mul_(1.01)

    def digest(model: nn.Module, folder: Path, **settings: Any) -> str:
        with dvora.AdapterBank(model, like=folder, **settings) as bank:
            bank.add("any", folder)
            return bank.digest("any")

    name = digest(these.base(), these.path("a"))
    assert digest(these.base(), these.path("a"), dtype=torch.float16) == name
    others = [digest(nudged, these.path("a"))]
    changed = {"projection_seed": 1}, {"alpha": 2.0}, {"direction": "weight"}, {"lambda_d_groups": 2}
    for number, settings in enumerate(changed):
        others.append(digest(these.base(), saved(HEADED.trained(**settings), tmp_path / str(number))))
    assert len({name, *others}) == 6


@by_groups
def test_bits_do_not_depend_on_the_adapters_that_were_read_together(groups: int, tmp_path: Path) -> None:
    these = tenants(HEADED.by_groups(groups), tmp_path)
    with these.bank() as one, these.bank() as other:
        with torch.inference_mode():
            other(["c", "a", "b", "a"])
        assert torch.equal(one(["a"] * 4), other(["a"] * 4))


def test_equal_adapters_share_a_slot_and_their_rows(tmp_path: Path) -> None:
    these = tenants(MLP, tmp_path, 2)
    with these.bank(slots=1) as served:
        served.bank.add("again", these.path("a"))
        assert served.bank.digest("again") == served.bank.digest("a") != served.bank.digest("b")
        assert served.bank.digest_of(these.path("b")) == served.bank.digest("b")
        found = served(["a", "again", None, "a"])
        stats = served.bank.stats()
        assert (stats.adapters, stats.slots_filled, stats.host_adapters) == (3, 1, 2)
        served.bank.remove("a")
        assert torch.equal(served(["again"] * 4)[:2], found[:2])
        assert served.bank.stats().reads == stats.reads


def test_a_closed_bank_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 1)
    model = these.base()
    before, hooks = snapshot(model), [len(each._forward_hooks) for each in model.modules()]
    bank = dvora.AdapterBank(model, like=these.path("a"))
    bank.add_folder(tmp_path)
    with bank.rows(["a"] * 4):
        outputs(model)
    assert_unchanged(model, before)
    bank.close()
    bank.close()
    assert_unchanged(model, before)
    assert [len(each._forward_hooks) for each in model.modules()] == hooks
    assert not any(each._forward_pre_hooks for each in model.modules())
    assert same_bits(outputs(model), outputs(these.base()))


def test_statistics_count_what_happens(tmp_path: Path) -> None:
    these = tenants(MLP, tmp_path, 4)
    with these.bank(slots=2) as served:
        bank = served.bank
        assert bank.stats().reads == 0
        with bank.rows(["a", "b", None, "a"]):
            stats = bank.stats()
            assert (stats.slots_filled, stats.slots_in_use, stats.loads, stats.hits) == (2, 2, 2, 0)
        served(["a", "c", None, "a"])
        stats = bank.stats()
        assert (stats.slots, stats.slots_in_use, stats.loads, stats.hits, stats.evictions) == (2, 0, 3, 1, 1)
        assert (stats.reads, stats.host_adapters, stats.adapters) == (3, 3, 4)
        width = sum(2 * out + 4 for out in (24, 24, 6))
        assert stats.host_bytes == 3 * 4 * width
        assert stats.device_bytes == (2 + 1) * 4 * width


def test_gradients_flow_through_a_batch_to_its_inputs(tmp_path: Path) -> None:
    these = tenants(MLP, tmp_path, 2, torch.float64)
    x = inputs(these.base())["x"].double().requires_grad_()
    with these.bank() as served, served.bank.rows(NAMES):
        (found,) = torch.autograd.grad(served.model(x).sum(), x)
    expected = row_by_row(lambda name: torch.autograd.grad(these.alone(name)(x).sum(), x)[0], NAMES)
    assert worst_difference(found, expected) < 1e-5


def test_modes_without_gradients_may_be_mixed(tmp_path: Path) -> None:
    these = tenants(HEADED, tmp_path, 2)
    model = these.base()
    with torch.inference_mode():
        bank = dvora.AdapterBank(model, slots=1, like=these.path("a"))
        bank.add("a", these.path("a"))
    bank.add("b", these.path("b"))
    x = inputs(model)["x"]
    for name in ("a", "b"):
        with bank.rows([name] * 4):
            with torch.inference_mode():
                first = model(x)
            asked = x.clone().requires_grad_()
            second = model(asked)
            second.sum().backward()
        # Without gradients the outputs are written in place, and rounded in another order.
        torch.testing.assert_close(first, second)
        assert asked.grad.any()
        check_rows(second, these, [name] * 4, 1e-5)


# Quantised bases of every library.


WIDE_LAYERS = ["lin0", "lin1", "lin2"]
OF_QUANTISED = ["a", None, "b", "a", None, "c"]


@by_groups
@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_are_those_of_the_dense_reference(kind: str, groups: int, tmp_path: Path) -> None:
    config = dvora.DVoRAConfig(r=8, target_modules=WIDE_LAYERS, lambda_d_groups=groups)
    x = torch.randn(len(OF_QUANTISED), 64, generator=torch.Generator().manual_seed(0)).to(BASES[kind].dtype)
    with torch.no_grad():
        expected: dict[str | None, Tensor] = {None: quantised(wide(), kind).eval()(x)}
    for seed, name in enumerate("abc"):
        # Trained on the quantised base.
        model = get_peft_model(quantised(wide(), kind), config).eval()
        train_vectors(model, seed=seed)
        model.save_pretrained(tmp_path / name)
        expected[name] = dense_twin(model, wide(), kind)(x.double()).detach()
    base = quantised(wide(), kind).eval()
    with dvora.AdapterBank(base, like=tmp_path / "a") as bank, torch.no_grad():
        bank.add_folder(tmp_path)
        with bank.rows(OF_QUANTISED):
            found = base(x)
        with bank.rows([None] * len(OF_QUANTISED)):
            assert same_bits(base(x), expected[None])
    assert same_bits(found[[1, 4]], expected[None][[1, 4]])
    rows = torch.stack([expected[name][row].double() for row, name in enumerate(OF_QUANTISED)])
    assert worst_difference(found, rows) < 3 * BASES[kind].eval_tolerance
    with torch.no_grad():
        assert same_bits(base(x), expected[None])
