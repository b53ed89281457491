"""What a bank refuses: one clear error each that names the argument; nothing is half added, nothing is lost."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dvora
from dvora.adapter_file.packs import write_pack
from dvora.adapter_file.values_file import VALUES
from tests.bank.tenants import HEADED, MLP, Served, Tenants, change_values, row_by_row, tenants
from tests.peft.kinds import Kind, edit_config, edit_weights, saved
from tests.peft.layer_cases import CASES
from tests.peft.lora import lora
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import MODELS, inputs, mlp, outputs, same_bits

NAMES = ["a", None, "b", "a"]
ANY = (ValueError, TypeError)
ONE = 4 * (2 * (2 * 24 + 4) + 6 * 24)
"""Bytes of an adapter with a head."""


@pytest.fixture(scope="module")
def these(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return tenants(HEADED, tmp_path_factory.mktemp("tenants"))


@pytest.fixture
def served(these: Tenants) -> Iterator[Served]:
    """A bank with three adapters of which two were read, and that serves as before at the end."""
    with these.bank(slots=2) as served:
        before, held = served(NAMES), list(served.bank)
        yield served
        assert list(served.bank) == held
        assert served.bank.stats().slots_in_use == 0
        assert torch.equal(served(NAMES), before)


def check_serves(served: Served, these: Tenants, names: list[str | None]) -> None:
    """Each row is that of its adapter's merged model."""
    alone = row_by_row(lambda name: outputs(these.alone(name)), names)
    assert worst_difference(served(names), alone) < 1e-5


# Settings and models


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"slots": 0}, ValueError, "slots must be a positive integer, got 0"),
        ({"slots": True}, ValueError, "slots must be a positive integer, got True"),
        ({"host_bytes": -1}, ValueError, "host_bytes must be a positive integer, got -1"),
        ({"dtype": torch.int8}, ValueError, r"dtype must be one of torch\.float32, .* got torch\.int8"),
        ({}, ValueError, "like: nothing says which layers the bank serves; pass the folder of an adapter"),
        ({"like": 3}, TypeError, "like must be a path, got 3"),
        ({"like": "/no/such/place"}, ValueError, "/no/such/place is not a file; a pack is"),
    ],
    ids=str,
)
def test_wrong_settings_of_a_bank(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dvora.AdapterBank(mlp(), **settings)


def test_what_is_no_model_of_a_bank(these: Tenants) -> None:
    with pytest.raises(TypeError, match="model must be a torch module, got 'mlp'"):
        dvora.AdapterBank("mlp")
    with pytest.raises(ValueError, match=r"model: .*lin.* has an adapter already; pass the base model itself"):
        dvora.AdapterBank(MLP.fresh(), like=these.path("a"))
    with pytest.raises(ValueError, match=r"model: lin0\.weight is not whole and in the memory of this process"):
        dvora.AdapterBank(these.base().to("meta"), like=these.path("a"))
    model = these.base()
    model.again = model.lin0
    with pytest.raises(ValueError, match=r"lin0 is one module in several places \(lin0, again\)"):
        dvora.AdapterBank(model, like=these.path("a"))


def test_a_model_of_another_bank(these: Tenants) -> None:
    message = r"model: .* is served by another bank; close that one first"
    with dvora.AdapterBank(model := these.base(), like=these.path("a")), pytest.raises(ValueError, match=message):
        dvora.AdapterBank(model, like=these.path("a"))
    dvora.AdapterBank(model, like=these.path("a")).add("a", these.path("a"))


def with_two_dtypes() -> Any:
    model = MODELS["mlp"]()
    model.lin2.half()
    return model


def of_case(name: str) -> Kind:
    return Kind(CASES[name].base, {"r": 3, **CASES[name].settings})


NOT_HELD: dict[str, tuple[Kind, str]] = {
    "a weight that attention reads": (of_case("MultiheadAttention"), "that the module around it reads.*leave it out"),
    "a parameter": (of_case("experts (E, out, in)"), "is a weight that the module around it reads"),
    "biases": (Kind(MLP.base, {**MLP.settings, "bias": "dvora_only"}), r"saves lin0\.bias \(bias='dvora_only'\)"),
    "tokens": (
        Kind(MODELS["llama"], {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [5, 3]}),
        r"the adapter trains tokens \(trainable_token_indices\)",
    ),
    "heads of several dtypes": (
        Kind(with_two_dtypes, {"r": 3, "target_modules": ["lin1"], "modules_to_save": ["lin2", "lin0"]}),
        "model: its heads have several dtypes; cast them to one",
    ),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_a_bank_does_not_hold(name: str, tmp_path: Path) -> None:
    kind, message = NOT_HELD[name]
    saved(kind.trained(), tmp_path / "a")
    before = snapshot(model := kind.base())
    with pytest.raises(ValueError, match=f"like: .*{message}"):
        dvora.AdapterBank(model, like=tmp_path / "a")
    assert_unchanged(model, before)
    assert not any(module._forward_hooks for module in model.modules())


CHANGES: dict[str, Callable[[Any], object]] = {
    "written to": lambda model: model.lin1.weight.mul_(2),
    "cast": lambda model: model.half(),
    "loaded": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "another parameter": lambda model: setattr(model.lin1, "weight", nn.Parameter(model.lin1.weight.clone())),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model.lin1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_was_changed(change: str, these: Tenants) -> None:
    with these.bank() as served:
        served(NAMES)
        with torch.no_grad():
            CHANGES[change](served.model)
        with pytest.raises(ValueError, match=r"lin\d: its weight was written to, cast or moved since the bank"):
            served(NAMES)


# Names and rows


@pytest.mark.parametrize(
    ("names", "repeats", "error", "message"),
    [
        (["a", "bb"], 1, ValueError, "there is no adapter 'bb' among the 3 of the bank, did you mean 'b'?"),
        ("a", 1, TypeError, "names must be a list with one name a row, got 'a'"),
        (None, 1, TypeError, "names must be a list with one name a row, got None"),
        ([], 1, ValueError, "names is empty"),
        (["a", 3], 1, TypeError, "names must be strings, or None for the base, got 3"),
        (["a"], 0, ValueError, "repeats must be a positive integer, got 0"),
        (["a"], True, ValueError, "repeats must be a positive integer, got True"),
        (["a", "b", "c"], 1, ValueError, "a batch has 3 different adapters, and the bank 2 slots;"),
    ],
    ids=str,
)
def test_wrong_rows(names: Any, repeats: Any, error: type[Exception], message: str, served: Served) -> None:
    with pytest.raises(error, match=message), served.bank.rows(names, repeats):
        raise AssertionError


@pytest.mark.parametrize(("count", "repeats"), [(3, 1), (8, 1), (2, 3)])
def test_another_number_of_names_than_rows(count: int, repeats: int, served: Served) -> None:
    message = rf"bank.rows got {count} names(, each repeated 3 times)?, and the layer a batch of 4 rows; give one name"
    with pytest.raises(ValueError, match=message), served.bank.rows(["a"] * count, repeats):
        served.model(inputs(served.model)["x"])


def test_wrong_names(served: Served, these: Tenants) -> None:
    bank = served.bank
    with pytest.raises(TypeError, match="names must be a list of names, got 'a'"):
        bank.trainable("a")
    with pytest.raises(TypeError, match="names must be strings, got None"):
        bank.trainable(["a", None])
    for of_one in (bank.remove, bank.digest, lambda name: bank.replace(name, these.path("a"))):
        with pytest.raises(ValueError, match="there is no adapter 'aa' among the 3 of the bank, did you mean 'a'"):
            of_one("aa")
    for name in ("", None, 3):
        with pytest.raises(TypeError, match="name must be a string that is not empty"):
            bank.add(name, these.path("a"))
    with pytest.raises(ValueError, match=r"name: there is an adapter 'a' already; use bank\.replace, or remove it"):
        bank.add("a", these.path("b"))


def test_outside_of_rows_and_in_a_second_batch(served: Served) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"called outside of bank.rows\(...\), so nobody said which adapter"):
            outputs(served.model)
        with served.bank.rows(["a"] * 4):
            with pytest.raises(ValueError, match="this call is in a batch of the bank"), served.bank.rows(["b"] * 4):
                raise AssertionError
            outputs(served.model)


def test_a_closed_bank(these: Tenants) -> None:
    bank = dvora.AdapterBank(model := these.base(), like=these.path("a"))
    bank.add("a", these.path("a"))
    with bank.rows(["a"] * 4):
        with pytest.raises(ValueError, match=r"1 batches are in the bank, .* before it is closed"):
            bank.close()
        outputs(model)
    bank.close()
    for call in (
        lambda: bank.rows(["a"]).__enter__(),
        lambda: bank.add("b", these.path("b")),
        lambda: bank.replace("a", these.path("b")),
        lambda: bank.digest("a"),
        bank.stats,
    ):
        with pytest.raises(ValueError, match="the bank was closed; make a new one"):
            call()
    outputs(model)


# Adapters


def adapter(**settings: Any) -> Callable[[Path], object]:
    return lambda folder: saved(HEADED.trained(**settings), folder)


def with_values(change: Callable[[str, Tensor], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        saved(HEADED.trained(), folder)
        edit_weights(folder, lambda tensors: [change(name, tensor) for name, tensor in tensors.items()])

    return make


def without_direction(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lambda" in name:
            tensor.fill_("lambda_b" in name)


LIN1 = "base_model.model.lin1"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another seed": (adapter(projection_seed=1), "projection_seed is 0 here and 1 there"),
    "another rank": (adapter(r=5), r"lin0 is .*rank 4.* here and .*rank 5.* there"),
    "other groups": (adapter(lambda_d_groups=2), r"lin0 is .*scaling 1.0 here and .*groups 2 there"),
    "other groups than its settings say": (
        lambda folder: edit_config(saved(HEADED.trained(lambda_d_groups=2), folder), lambda_d_groups=4),
        r"lin\d.* has shape \(2, 4\) in the adapter and \(4, 4\) in its configuration.* or other lambda_d_groups",
    ),
    "groups that its settings lack": (
        lambda folder: edit_config(saved(HEADED.trained(lambda_d_groups=2), folder), lambda_d_groups=1),
        r"lin\d.* has shape \(2, 4\) in the adapter and \(4,\) in its configuration",
    ),
    "fewer layers than it names": (
        lambda folder: edit_weights(
            saved(HEADED.trained(), folder),
            lambda tensors: [tensors.pop(name) for name in [*tensors] if "lin0" in name],
        ),
        "lacks lin0, and 1 of the others'",
    ),
    "untrained": (lambda folder: saved(HEADED.fresh(), folder), "it changes nothing; pass allow_unchanged=True"),
    "without a direction": (
        lambda folder: edit_weights(saved(HEADED.fresh(), folder), without_direction),
        "it changes nothing",
    ),
    "not finite": (with_values(lambda name, v: v.fill_(torch.nan) if "lin1" in name else v), "lin1.* are not finite"),
    "a weight of another base": (
        lambda folder: edit_weights(
            saved(HEADED.trained(), folder),
            lambda tensors: tensors.update({f"{LIN1}.base_layer.weight": torch.ones_like(HEADED.base().lin1.weight)}),
        ),
        r"does not train: .*lin1\.base_layer\.weight",
    ),
    "no folder": (lambda folder: None, r"there is no file adapter_config\.json"),
    "a fingerprint of other matrices": (
        lambda folder: edit_config(saved(HEADED.trained(), folder), projection_fingerprint="0" * 16),
        "projection_fingerprint is '0000000000000000', but projection_seed=0",
    ),
    "no source": (None, "source must be a path or a flat vector, got None"),
    "a short vector": (torch.zeros(3), r"vector has shape \(3,\), expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_is_refused_by_name_and_reason(name: str, served: Served, tmp_path: Path) -> None:
    wrong, message = WRONG[name]
    if callable(wrong):
        wrong(tmp_path / "wrong")
        wrong = tmp_path / "wrong"
    bank, before = served.bank, served.bank.stats()
    for call in (lambda: bank.add("new", wrong), lambda: bank.replace("a", wrong)):
        with pytest.raises(ANY, match=message):
            call()
    assert bank.stats() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("not finite", "lin1.* are not finite"), ("fewer layers than it names", "like: the adapter lacks lin0")],
    ids=str,
)
def test_a_wrong_adapter_that_says_the_layers_leaves_the_model_alone(
    name: str, message: str, these: Tenants, tmp_path: Path
) -> None:
    make, _ = WRONG[name]
    make(tmp_path / "wrong")
    model = these.base()
    with pytest.raises(ANY, match=message):
        dvora.AdapterBank(model, like=tmp_path / "wrong")
    assert same_bits(outputs(model), outputs(these.base()))
    with dvora.AdapterBank(model, like=these.path("a")) as bank:
        bank.add_folder(these.folder)
        check_serves(Served(model, bank), these, NAMES)


def test_a_wrong_adapter_among_many_adds_none(these: Tenants, served: Served, tmp_path: Path) -> None:
    for name in ("d", "e", "f"):
        shutil.copytree(these.path("a"), tmp_path / name)
    saved(HEADED.trained(projection_seed=1), tmp_path / "e")
    write_pack(tmp_path / "pack", {name: tmp_path / name for name in ("d", "e", "f")})
    for add, path in ((served.bank.add_folder, tmp_path), (served.bank.add_pack, tmp_path / "pack")):
        with pytest.raises(ValueError, match=r"adapter 'e': .*projection_seed is 0 here and 1 there"):
            add(path)
    shutil.rmtree(tmp_path / "e")
    shutil.copytree(these.path("a"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"name: there is an adapter 'a' already; use bank\.replace"):
        served.bank.add_folder(tmp_path)


@pytest.mark.parametrize("name", ["not finite", "untrained"])
def test_a_wrong_value_among_many_is_found_at_the_first_use(name: str, served: Served, tmp_path: Path) -> None:
    make, message = WRONG[name]
    make(tmp_path / "bad")
    served.bank.add_folder(tmp_path)
    for use in (lambda: served(["bad", "a", None, None]), lambda: served.bank.digest("bad")):
        with pytest.raises(ValueError, match=f"adapter 'bad': .*{message}"):
            use()
    served.bank.remove("bad")


def test_a_folder_that_changes_is_refused_until_it_is_replaced(these: Tenants, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(these.path(name), tmp_path / name)
    with dvora.AdapterBank(model := these.base(), slots=1, host_bytes=ONE, like=these.path("a")) as bank:
        bank.add_folder(tmp_path)
        served = Served(model, bank)
        before = served(["a"] * 4)
        change_values(tmp_path / "a", 3)
        assert torch.equal(served(["a"] * 4), before)
        served(["b"] * 4)
        with pytest.raises(ValueError, match="adapter 'a': it has other values than when it was first used; call bank"):
            served(["a"] * 4)
        bank.replace("a", tmp_path / "a")
        assert not torch.equal(served(["a"] * 4), before)


def test_what_half_precision_cannot_hold(these: Tenants, tmp_path: Path) -> None:
    with_values(lambda name, v: v.mul_(1e7 if "lin1.dvora_magnitude" in name else 1))(tmp_path / "a")
    bank = dvora.AdapterBank(these.base(), dtype=torch.float16, like=these.path("a"))
    with pytest.raises(ValueError, match=r"'a': the adapter has factors that torch\.float16 cannot hold"):
        bank.add("a", tmp_path / "a")
    with dvora.AdapterBank(these.base(), dtype=torch.bfloat16, like=these.path("a")) as bank:
        bank.add("a", tmp_path / "a")


def test_heads_that_the_dtype_of_the_base_cannot_hold(tmp_path: Path) -> None:
    half = tenants(HEADED, tmp_path, 1, torch.float16)
    values = {name: value.float() for name, value in load_file(half.path("a") / VALUES).items()}
    values["base_model.model.lin2.weight"] *= 1e6
    edit_weights(half.path("a"), lambda tensors: tensors.update(values))
    message = r"adapter 'a': the adapter has values in its head, lin2\.weight, that torch\.float16, .* cannot hold"
    with pytest.raises(ValueError, match=message):
        dvora.AdapterBank(half.base(), like=half.path("a")).add("a", half.path("a"))


def test_host_bytes_that_cannot_hold_one_adapter(these: Tenants) -> None:
    with pytest.raises(ValueError, match=rf"host_bytes=100 cannot hold one adapter, which takes {ONE} bytes"):
        dvora.AdapterBank(these.base(), host_bytes=100, like=these.path("a"))


class Rows(nn.Module):
    """A layer, and a head, of inputs (B, T, 4), which they get with tokens first where that is asked for."""

    def __init__(self, tokens_first: bool = False) -> None:
        super().__init__()
        self.tokens_first, self.layer, self.head = tokens_first, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.tokens_first:
            return self.head(self.layer(x))
        outputs: Tensor = self.head(self.layer(x.transpose(0, 1))).transpose(0, 1)
        return outputs


@pytest.mark.parametrize("method", ["dvora", "lora", "a head"])
def test_as_many_rows_as_tokens(method: str, tmp_path: Path) -> None:
    """Where nothing has shown yet which are which, nobody gets another's adapter."""
    base, x = Rows().eval(), torch.randn(3, 3, 4)
    settings = {"target_modules": ["layer"]}
    if method == "lora":
        lora(copy.deepcopy(base), tmp_path / "a", **settings)
    else:
        heads = {"modules_to_save": ["head"]} if method == "a head" else {}
        saved(Kind(lambda: copy.deepcopy(base), {"r": 2, **settings, **heads}).trained(), tmp_path / "a")
    message = r"got inputs of shape \(3, 3, 4\), and no batch has shown yet which dimension has the rows"
    with dvora.AdapterBank(base, like=tmp_path / "a", own_heads=True) as bank, torch.no_grad():
        bank.add("a", tmp_path / "a")

        def run(names: list[str | None], x: Tensor) -> Tensor:
            with bank.rows(names):
                return base(x)

        with pytest.raises(ValueError, match=message):
            run(["a", None, "a"], x)
        expected = torch.cat([run([name], x[row : row + 1]) for row, name in enumerate(["a", None, "a"])])
        torch.testing.assert_close(run(["a", None, "a"], x), expected)
    base.tokens_first = True
    with dvora.AdapterBank(base, like=tmp_path / "a", own_heads=True) as bank, torch.no_grad():
        bank.add("a", tmp_path / "a")
        with pytest.raises(ValueError, match="the layer a batch of 3 rows"):
            run(["a"], x[:1])
        with pytest.raises(ValueError, match=message):
            run(["a", None, "a"], x)


def test_a_module_that_was_replaced(these: Tenants) -> None:
    """What is in its place has no hooks, and would answer in the adapters' names."""
    model = these.base()
    with dvora.AdapterBank(model, like=these.path("a")) as bank:
        bank.add("a", these.path("a"))
        layer, model.lin1 = model.lin1, nn.Linear(24, 24)
        with pytest.raises(ValueError, match="model: lin1, a Linear, was replaced or removed since the bank was made"):
            Served(model, bank)(NAMES[:1] * 4)
        model.lin1 = layer
        check_serves(Served(model, bank), these, ["a"] * 4)
