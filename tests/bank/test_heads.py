"""Heads of any number of outputs in one batch; strengths and settings of training belong to each adapter."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import dvora
from dvora.adapter_file.values_file import VALUES
from dvora.flat import Layout
from tests.bank.tenants import HEADED, MLP, Served
from tests.bank.versions import in_threads
from tests.peft.kinds import Kind, mlp, saved
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import MODELS, inputs
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import adapted

CLASSES = {"two": 2, "five": 5, "more": 25}


def base(outputs: int) -> nn.Module:
    model = MODELS["mlp"]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(outputs)
        model.lin2 = nn.Linear(model.lin2.in_features, outputs)
    return model.eval().requires_grad_(False)


def kind(outputs: int) -> Kind:
    return Kind(lambda: base(outputs), HEADED.settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    for name, outputs in CLASSES.items():
        saved(kind(outputs).trained(outputs), folder / name)
    return folder


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    model = base(2)
    with dvora.AdapterBank(model, like=folder / "two") as bank:
        bank.add_folder(folder)
        yield Served(model, bank)


def alone(folder: Path, name: str) -> nn.Module:
    return PeftModel.from_pretrained(base(CLASSES[name]).double(), folder / name).eval()


def test_every_row_has_the_outputs_of_its_own_head(served: Served, folder: Path) -> None:
    names = ["two", "more", "five", "two"]
    x = inputs(served.model, len(names))["x"]
    with torch.no_grad(), served.bank.rows(names) as batch:
        outputs = served.model(x)
        rows = batch.split(outputs)
    assert outputs.shape == (4, 25)
    for row, name, whole, x_of_row in zip(rows, names, outputs, x, strict=True):
        assert row.shape == (CLASSES[name],)
        assert whole[CLASSES[name] :].eq(-torch.inf).all()
        with torch.no_grad():
            assert worst_difference(row, alone(folder, name)(x_of_row.double()[None])[0]) < 1e-5


def test_rows_of_one_number_are_not_filled_up_and_the_base_has_its_own(served: Served) -> None:
    x = inputs(served.model, 2)["x"]
    with torch.no_grad():
        with served.bank.rows(["two", "two"]) as batch:
            assert served.model(x).shape == (2, 2)
        warned = pytest.warns(
            UserWarning, match="rows of None get the model's own lin2, whose values are random unless"
        )
        with warned, served.bank.rows([None, "more"]) as batch:
            outputs = served.model(x)
        assert [len(row) for row in batch.split(outputs)] == [2, 25]
        served.bank.close()
        assert torch.equal(outputs[0, :2], served.model(x)[0])


def test_larger_heads_that_come_change_nothing_for_those_that_are_there(folder: Path) -> None:
    model = base(2)
    x = inputs(model, 1)["x"]
    with dvora.AdapterBank(model, slots=2, like=folder / "two") as bank, torch.no_grad():
        bank.add_folder(folder)
        served = Served(model, bank)
        with bank.rows(["two"]) as batch:
            before = model(x)
            in_threads(lambda: served(["more"], x))
            assert torch.equal(model(x), before)
            assert len(batch.split(before)[0]) == 2
        assert worst_difference(served(["two", "more"], x.expand(2, -1))[0, :2], before[0]) < 1e-6


def test_a_head_takes_its_own_bytes_within_a_bound(folder: Path, tmp_path: Path) -> None:
    """A large one makes no other slot larger, and frees its own when it leaves it."""
    model, wide = base(2), kind(1000)
    inputs_of_head = model.lin2.in_features
    size = {outputs: 4 * outputs * (inputs_of_head + 1) for outputs in (2, 25, 1000)}
    saved(wide.trained(0), tmp_path / "wide")
    x = inputs(model, 1)["x"]
    with dvora.AdapterBank(model, slots=2, head_bytes=2 * size[1000], like=folder / "two") as bank:
        bank.add_folder(folder)
        bank.add("wide", tmp_path / "wide")
        served = Served(model, bank)
        empty = bank.stats().device_bytes
        # The last two adapters are in the slots.
        for name, *outputs in (("two", 2), ("wide", 2, 1000), ("more", 1000, 25), ("two", 25, 2)):
            served([name], x)
            assert bank.stats().device_bytes == empty + sum(size[number] for number in outputs)
    with dvora.AdapterBank(model, slots=2, head_bytes=2 * size[1000] - 1, like=folder / "two") as bank:
        bank.add_folder(folder)
        with pytest.raises(ValueError, match=rf"'wide': its head and factors take {size[1000]:,} bytes .*head_bytes"):
            bank.add("wide", tmp_path / "wide")
        with pytest.raises(ValueError, match="more head_bytes or fewer slots"):
            bank.replace("two", tmp_path / "wide")
        assert sorted(bank) == sorted(CLASSES)
    with dvora.AdapterBank(base(2), head_bytes=1, like=folder / "two") as bank:
        # As large as the model's own is always right.
        bank.add("two", folder / "two")


def test_heads_of_other_inputs_are_refused(served: Served, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "more", tmp_path / "wrong")
    values = load_file(tmp_path / "wrong" / VALUES)
    (key,) = [key for key in values if key.endswith("lin2.weight")]
    save_file({**values, key: values[key][:, 1:].contiguous()}, tmp_path / "wrong" / VALUES)
    with pytest.raises(ValueError, match=r"adapter 'wrong': .* lin2.weight is shape"):
        served.bank.add("wrong", tmp_path / "wrong")
    # A vector is of the adapter that it replaces.
    vector = Layout.of(folder / "more").to_vector(folder / "more")
    with pytest.raises(ValueError, match="vector has shape"):
        served.bank.replace("two", vector)
    served.bank.replace("more", vector)


def test_split_names_what_it_cannot_split(served: Served) -> None:
    x = inputs(served.model, 1)["x"]
    with torch.no_grad(), served.bank.rows(["two"]) as batch:
        with pytest.raises(ValueError, match=r"head: None is none that has run in this batch"):
            batch.split(x)
        outputs = served.model(x)
        with pytest.raises(ValueError, match="outputs has 2 rows, and the batch 1"):
            batch.split(outputs.expand(2, -1))
        with pytest.raises(ValueError, match=r"head: 'lin9' is none that has run in this batch: \['lin2'\]"):
            batch.split(outputs, "lin9")


def test_adapters_with_different_heads_train_together_and_are_published(served: Served, folder: Path) -> None:
    trained = served.bank.trainable(["two", "more"])
    optimizer = torch.optim.AdamW(trained.parameter_groups(0.01), foreach=True)
    names = ["two", "more", "more"]
    x, labels = inputs(served.model, 3)["x"], torch.tensor([1, 24, 3])
    losses: list[Tensor] = []
    for _ in range(8):
        with trained.rows(names) as rows:
            loss = rows.loss(nn.functional.cross_entropy(served.model(x), labels, reduction="none"))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    assert not trained.parameters_of["two"]["head"].isnan().any()
    served.bank.publish(trained)
    with torch.no_grad():
        with served.bank.rows(names) as batch:
            outputs = served.model(x)
        assert [len(row) for row in batch.split(outputs)] == [2, 25, 25]
        with trained.rows(names):
            assert worst_difference(served.model(x)[:, :2], outputs[:, :2]) < 1e-6


# What belongs to each adapter


def test_a_vector_has_the_strength_of_the_adapter_that_it_replaces(tmp_path: Path) -> None:
    weak, plain = mlp(strength=0.5), MLP
    saved(weak.trained(0), tmp_path / "weak")
    saved(plain.trained(0), tmp_path / "plain")
    model = MLP.base().requires_grad_(False)
    x = inputs(model, 1)["x"]
    with dvora.AdapterBank(model, like=tmp_path / "weak") as bank:
        bank.add("weak", tmp_path / "weak")
        bank.add("plain", tmp_path / "plain")
        served = Served(model, bank)
        before = {name: served([name], x) for name in bank}
        assert worst_difference(before["weak"], before["plain"]) > 1e-3
        for name in bank:
            vector = Layout.of(tmp_path / name).to_vector(tmp_path / name)
            bank.replace(name, vector)
            assert torch.equal(served([name], x), before[name])
            # Anew, a vector has a strength of one.
            bank.add(f"new {name}", vector)
            assert torch.equal(served([f"new {name}"], x), before["plain"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dvora_dropout": 0.1}, "dvora_dropout of 'b' is 0.1"),
        ({"train": ["lambda_b"]}, "train of 'b' is"),
        ({"detach_norm": True}, "detach_norm of 'b' is True"),
    ],
    ids=str,
)
def test_adapters_with_other_settings_of_training_are_trained_apart(
    setting: dict[str, object], message: str, tmp_path: Path
) -> None:
    saved(MLP.trained(0), tmp_path / "a")
    saved(mlp(**setting).trained(1), tmp_path / "b")
    with dvora.AdapterBank(MLP.base().requires_grad_(False), like=tmp_path / "a") as bank:
        bank.add_folder(tmp_path)
        with pytest.raises(ValueError, match=message):
            bank.trainable(["a", "b"])
        if "detach_norm" in setting:
            with pytest.raises(ValueError, match="detach_norm is True for 'b', and the bank was made for False"):
                bank.trainable(["b"])
        else:
            assert bank.trainable(["b"], new=["c"]).config.dvora_dropout == setting.get("dvora_dropout", 0)


def test_all_that_peft_trains_of_a_head_is_served(tmp_path: Path) -> None:
    """By ends of names: `classifier`, which PEFT names by itself, is `pre_classifier` too."""
    folder = tiny_models.distilbert(tmp_path / "base")
    ids = torch.tensor([[2, 5, 7, 3]] * 2)
    expected = []
    for name, classes in (("two", 2), ("five", 5)):
        model = adapted(folder, "dvora", task_type="SEQ_CLS", classes=classes, target_modules=["q_lin"])
        model.save_pretrained(tmp_path / "adapters" / name)
        expected.append(model(ids[:1]).logits[0])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad(), dvora.AdapterBank(model, like=tmp_path / "adapters" / "two") as bank:
        bank.add_folder(tmp_path / "adapters")
        with bank.rows(["two", "five"]) as batch:
            for row, values in zip(batch.split(model(ids).logits, "classifier"), expected, strict=True):
                torch.testing.assert_close(row, values)
