"""Gradients of a mixed batch are those of each adapter alone, through PEFT; what is published is what was trained."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import dvora
from dvora.flat import Layout
from tests.bank.tenants import HEADED, MLP
from tests.bank.trained import (
    NAMES,
    Alone,
    Together,
    batch_of,
    check_gradients,
    gradient_of,
    gradient_vector,
    row_losses,
    save_all,
    together,
)
from tests.peft.kinds import GROUPS, Kind, by_groups, edit_config, mlp, saved
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, inputs

KINDS = {
    **{name: Kind(MODELS[name], {"r": 6, "target_modules": LAYERS[name]}) for name in MODELS},
    "head": HEADED,
    "classifier": Kind(MODELS["bert"], {"r": 3, "target_modules": LAYERS["bert"], "task_type": "SEQ_CLS"}),
    "magnitudes": mlp(target_modules=["lin1"], magnitude_modules=["lin0", "lin2"]),
    "weight direction": mlp(alpha=3.5, rank_pattern={"lin1": 7}, direction="weight"),
    "detached norm": mlp(detach_norm=True),
}
MIXED = ["c", "a", "b", "b", "a", "a"]


@by_groups
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_each_alone(name: str, groups: int, tmp_path: Path) -> None:
    kind = KINDS[name].by_groups(groups)
    save_all(kind, tmp_path)
    with together(kind, tmp_path) as both:
        alone, batch = Alone(tmp_path, kind.base), batch_of(both.model, MIXED)
        both.backward(batch)
        alone.backward(batch)
        check_gradients(both, alone, 3e-6)


def test_a_step_may_be_several_batches(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both:
        alone, batch = Alone(tmp_path, MLP.base), batch_of(both.model, MIXED)
        alone.backward(batch)
        shares = torch.tensor([1 / MIXED.count(name) for name in MIXED])
        for first in (0, 3):
            part = slice(first, first + 3)
            with both.adapters.rows(MIXED[part]):
                losses = row_losses(both.model, {name: value[part] for name, value in batch.inputs.items()})
                (losses * shares[part]).sum().backward()
        check_gradients(both, alone)


def test_rows_may_weigh_differently(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    weights = torch.tensor([1, 3, 0, 2, 1, 0])
    with together(MLP, tmp_path) as both:
        alone, batch = Alone(tmp_path, MLP.base), batch_of(both.model, MIXED)
        with both.adapters.rows(MIXED) as rows:
            rows.loss(row_losses(both.model, batch.inputs), weights).backward()
        for name in NAMES:
            own = weights[torch.tensor([each == name for each in MIXED])].float()
            (row_losses(alone.models[name], batch.of(name)) @ (own / own.sum())).backward()
        check_gradients(both, alone)
        # An adapter whose rows weigh nothing has no loss.
        with both.adapters.rows(["a", "b"]) as rows:
            losses = torch.tensor([2.0, torch.pi])
            assert rows.loss(losses, torch.tensor([1.0, 0.0])) == 2


@pytest.mark.parametrize(
    ("name", "how"), [("llama", torch.bfloat16), ("classifier", torch.float16), ("classifier", "autocast")], ids=str
)
@by_groups
def test_half_precision(groups: int, name: str, how: str | torch.dtype, tmp_path: Path) -> None:
    kind = KINDS[name].by_groups(groups)
    if isinstance(how, torch.dtype):
        kind = kind._replace(base=lambda: KINDS[name].base().to(how))
    save_all(kind, tmp_path)
    with together(kind, tmp_path) as both:
        alone, batch = Alone(tmp_path, lambda: kind.base().float()), batch_of(both.model, MIXED)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            both.backward(batch)
        alone.backward(batch)
        assert both.adapters.parameters_of["a"]["lambda_b"].grad.dtype == torch.float32
        check_gradients(both, alone, 0.02 if how == torch.float16 else 0.1)


def test_dropout_is_of_a_model_in_training(tmp_path: Path) -> None:
    save_all(MLP, tmp_path, dvora_dropout=0.5)
    with together(MLP, tmp_path) as both:
        batch = batch_of(both.model, MIXED).inputs
        with both.adapters.rows(MIXED):
            before = both.model(**batch)
        both.model.train()
        with both.adapters.rows(MIXED):
            assert not torch.equal(both.model(**batch), both.model(**batch))
        both.model.eval()
        with both.adapters.rows(MIXED):
            assert torch.equal(both.model(**batch), before)


def test_parts_of_a_model_may_be_called(tmp_path: Path) -> None:
    kind = KINDS["classifier"]
    save_all(kind, tmp_path)
    with together(kind, tmp_path) as both, both.adapters.rows(["a", "b"]):
        batch, found = inputs(both.model, 2), list[Tensor]()
        for _ in range(2):
            found.append(both.model.bert(**batch).last_hidden_state)
            found[-1].square().mean().backward()
            both.optimizer.step()
        assert not torch.equal(*found)
        assert [both.adapters.parameters_of[name]["lambda_d"].grad is None for name in NAMES] == [False, False, True]


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return HEADED.by_groups(getattr(request, "param", 1))


@pytest.fixture
def both(kind: Kind, tmp_path: Path) -> Iterator[Together]:
    save_all(kind, tmp_path)
    with together(kind, tmp_path) as both:
        yield both


of_both_kinds = pytest.mark.parametrize("kind", [1, GROUPS], indirect=True, ids=["one group", "groups"])


@of_both_kinds
def test_what_is_published_is_served_and_saved(both: Together, tmp_path: Path) -> None:
    batch, before = batch_of(both.model, MIXED), snapshot(both.model)

    def served() -> Tensor:
        with torch.no_grad(), both.bank.rows(MIXED):
            return both.model(**batch.inputs)

    served_before = served()
    for _ in range(3):
        both.step(batch)
    assert_unchanged(both.model, before)
    assert torch.equal(served(), served_before)
    with torch.no_grad(), both.adapters.rows(MIXED):
        trained = both.model(**batch.inputs)
    both.bank.publish(both.adapters, ["a", "b"])
    of_c = torch.tensor([name == "c" for name in MIXED])
    assert torch.equal(served()[of_c], served_before[of_c])
    assert worst_difference(served()[~of_c], trained[~of_c]) < 1e-6
    both.bank.publish(both.adapters)
    assert worst_difference(served(), trained) < 1e-6
    model = PeftModel.from_pretrained(HEADED.base(), tmp_path / "c").eval()
    Layout.of(model).from_vector(both.adapters.flat_vector("c"), model)
    assert worst_difference(model(**batch.of("c")), trained[of_c]) < 1e-6


@of_both_kinds
def test_new_adapters_start_as_the_base_and_train_as_fresh_ones(kind: Kind, both: Together) -> None:
    adapters, fresh = both.bank.trainable(["a"], new=["x", "y"]), kind.fresh()
    batch, layout = batch_of(both.model, ["x", "y", "x"]), Layout.of(fresh)
    assert torch.equal(adapters.flat_vector("x"), layout.to_vector(fresh))
    with adapters.rows(batch.names) as rows:
        torch.testing.assert_close(both.model(**batch.inputs), HEADED.base()(**batch.inputs))
        rows.loss(row_losses(both.model, batch.inputs)).backward()
    row_losses(fresh, batch.of("x")).mean().backward()
    assert "x" not in both.bank
    torch.optim.AdamW(adapters.parameter_groups()).step()
    both.bank.publish(adapters)
    assert list(both.bank) == ["a", "b", "c", "x", "y"]
    assert worst_difference(gradient_of(adapters, "x"), gradient_vector(fresh, layout)) < 1e-6


def test_an_unknown_name_is_refused(both: Together) -> None:
    for names, error, message in (
        (["a", "d"], ValueError, r"names: 'd' is none of the 3 adapters in training \(a, b, c"),
        ([None], ValueError, "none of the 3 adapters"),
        ("a", TypeError, "names must be a list"),
    ):
        with pytest.raises(error, match=message), both.adapters.rows(names):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="names and new are empty"):
        both.bank.trainable()


def test_a_base_that_is_not_frozen_is_refused(both: Together) -> None:
    both.model.lin1.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: lin1.bias requires a gradient.* call model.requires_grad_\(False\)"):
        both.bank.trainable(["a"])


def test_another_number_of_rows_or_losses_is_refused(both: Together) -> None:
    batch = inputs(both.model, 3)
    with both.adapters.rows(["a", "b"]) as rows:
        with pytest.raises(ValueError, match="got 2 names, and the layer a batch of 3 rows"):
            both.model(**batch)
        with pytest.raises(ValueError, match=r"losses has shape \(3,\), expected one a row, \(2,\)"):
            rows.loss(torch.ones(3))
        with pytest.raises(ValueError, match=r"weights has shape \(3,\), expected one a row"):
            rows.loss(torch.ones(2), torch.ones(3))
        with pytest.raises(ValueError, match="in a batch of the bank already"), both.bank.rows(["a"]):
            pass
    with pytest.raises(ValueError, match=r"called outside of bank.rows"):
        both.model(**batch)


def test_a_strength_other_than_one_is_refused(tmp_path: Path) -> None:
    save_all(HEADED, tmp_path, strength=0.5)
    with dvora.AdapterBank(HEADED.base().requires_grad_(False), like=tmp_path / "a") as bank:
        bank.add_folder(tmp_path)
        with pytest.raises(ValueError, match="'a' has a strength other than one"):
            bank.trainable(["a"])


@pytest.mark.parametrize("setting", [{"dvora_dropout": 0.5}, {"train": ["magnitude"]}, {"detach_norm": True}], ids=str)
def test_adapters_with_other_settings_of_training_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    saved(HEADED.trained(), tmp_path / "a")
    edit_config(saved(HEADED.trained(1), tmp_path / "b"), **setting)
    with dvora.AdapterBank(HEADED.base().requires_grad_(False), like=tmp_path / "a") as bank:
        bank.add_folder(tmp_path)
        with pytest.raises(ValueError, match=f"{next(iter(setting))} of 'b' is .*; train them apart"):
            bank.trainable(["a", "b"])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "names": ("a", "c", "b")},
        lambda state: {**state, "vectors": state["vectors"][:, 1:]},
        lambda state: {**state, "heads": state["heads"][:2]},
    ],
    ids=["names", "vectors", "heads"],
)
def test_a_checkpoint_of_other_adapters_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], both: Together
) -> None:
    before = [parameter.detach().clone() for parameter in both.adapters.parameters()]
    with pytest.raises(ValueError, match="trainable with the same names in the same order"):
        both.adapters.load_state_dict(change(both.adapters.state_dict()))
    assert all(map(torch.equal, before, both.adapters.parameters()))
