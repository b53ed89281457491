"""What a bank refuses: one clear error each that names the argument, and nothing is half added, nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dvora
from dvora.bank.adapters import SETTINGS, VALUES
from dvora.bank.packs import write_pack
from dvora.flat import Layout
from tests.bank.adapters import change_values
from tests.bank.refusals import NAMES, refused
from tests.bank.tenants import HEADED, MLP, Served, Tenants, row_by_row, tenants
from tests.peft.kinds import Kind, saved
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import MODELS, mlp, outputs, same_bits

SETTINGS_OF_BANKS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"slots": 0}, ValueError, "slots must be a positive integer, got 0"),
    ({"slots": True}, ValueError, "slots must be a positive integer, got True"),
    ({"slots": 2.5}, ValueError, "slots must be a positive integer, got 2.5"),
    ({"host_bytes": -1}, ValueError, "host_bytes must be a positive integer, got -1"),
    ({"host_bytes": 1e9}, ValueError, "host_bytes must be a positive integer"),
    ({"dtype": torch.int8}, ValueError, r"dtype must be one of torch.float32, .* got torch.int8"),
    ({"dtype": torch.float64}, ValueError, "dtype must be one of"),
    ({"dtype": "float16"}, ValueError, "dtype must be one of"),
    ({"like": 3}, TypeError, "like must be a path, got 3"),
    ({"like": "/no/such/place"}, ValueError, "/no/such/place is not a file; a pack is"),
]


@pytest.mark.parametrize(("settings", "error", "message"), SETTINGS_OF_BANKS, ids=str)
def test_wrong_settings_of_a_bank(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    before = snapshot(model)
    with refused(error, message):
        dvora.AdapterBank(model, **settings)
    assert_unchanged(model, before)
    outputs(model)


def test_what_is_no_model() -> None:
    with refused(TypeError, "model must be a torch module, got 'mlp'"):
        dvora.AdapterBank("mlp")


def test_host_bytes_that_cannot_hold_one_adapter(these: Tenants) -> None:
    model = these.base()
    bank = dvora.AdapterBank(model, host_bytes=100)
    with refused(ValueError, r"adapter 'a': host_bytes=100 cannot hold one adapter, which takes \d+ bytes"):
        bank.add("a", these.path("a"))
    assert len(bank) == 0
    outputs(model)


def test_a_model_with_adapters_and_one_of_another_bank(these: Tenants) -> None:
    with refused(ValueError, "model: .*lin.* has an adapter already; pass the base model itself"):
        dvora.AdapterBank(MLP.fresh(), like=these.path("a"))
    model = these.base()
    second = dvora.AdapterBank(model)
    with dvora.AdapterBank(model, like=these.path("a")) as bank:
        with refused(ValueError, "model: .* is served by another bank; close that one first"):
            dvora.AdapterBank(model)
        with refused(ValueError, "adapter 'a': model: .* is served by another bank; close that one first"):
            second.add("a", these.path("a"))
        bank.add("a", these.path("a"))
        assert Served(model, bank)(["a"] * 4).isfinite().all()
    second.add("a", these.path("a"))


def test_a_model_that_is_not_in_memory(these: Tenants) -> None:
    with refused(ValueError, "model: lin0.weight is not whole and in the memory of this process"):
        dvora.AdapterBank(these.base().to("meta"), like=these.path("a"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MultiheadAttention", r"attn.* is a weight that the module around it reads"),
        ("TransformerEncoderLayer", r"self_attn.* is a weight that the module around it reads"),
        ("experts (E, out, in)", r"experts.* is a weight that the module around it reads"),
        ("transformers Mixtral experts", r"experts.* is a weight that the module around it reads"),
    ],
)
def test_weights_that_are_read_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    case = CASES[name]
    saved(Kind(case.base, {"r": 3, **case.settings}).trained(), tmp_path / "a")
    model = case.base()
    bank = dvora.AdapterBank(model)
    with refused(ValueError, f"adapter 'a': .*{message}.*leave it out of target_modules"):
        bank.add("a", tmp_path / "a")
    model(case.inputs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "dvora_only"}, r"the adapter saves lin0.bias \(bias='dvora_only'\)"),
        ({"bias": "all"}, r"the adapter saves lin0.bias \(bias='all'\)"),
    ],
    ids=str,
)
def test_what_a_bank_does_not_hold(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(MLP.trained(**settings), tmp_path / "a")
    with refused(ValueError, message):
        dvora.AdapterBank(mlp(), like=tmp_path / "a")


def test_trained_tokens_are_not_held(tmp_path: Path) -> None:
    kind = Kind(MODELS["llama"], {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [5, 3]})
    saved(kind.trained(), tmp_path / "a")
    with refused(ValueError, r"the adapter trains tokens \(trainable_token_indices\)"):
        dvora.AdapterBank(MODELS["llama"](), like=tmp_path / "a")


WRONG_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another seed": (lambda f: saved(HEADED.trained(projection_seed=1), f), "projection_seed is 0 here and 1 there"),
    "other matrices": (
        lambda f: saved(HEADED.trained(projection_init="kaiming_uniform"), f),
        "projection_init is 'structured' here and 'kaiming_uniform' there",
    ),
    "another direction": (lambda f: saved(HEADED.trained(direction="weight"), f), "direction is 'unit' here"),
    "another rank": (lambda f: saved(HEADED.trained(r=5), f), "lin0 is .*rank 4.* here and .*rank 5.* there"),
    "another scaling": (lambda f: saved(HEADED.trained(alpha=2.0), f), "lin0 is .*scaling 1.0 here"),
    "extra layers": (
        lambda f: saved(HEADED.trained(target_modules=["lin0", "lin1"], magnitude_modules=["lin0"]), f),
        "lin0 is .*rank 4.* here and .*rank 0.* there",
    ),
    "fewer layers": (lambda f: saved(HEADED.trained(target_modules=["lin1"]), f), "lacks lin0, and 1 of the bank's"),
    "no head": (lambda f: saved(HEADED.trained(modules_to_save=None), f), "lacks lin2.weight, and 1 of the bank's"),
    "a layer for a head": (lambda f: saved(MLP.trained(), f), "lacks lin2.weight"),
    "another base": (lambda f: saved(of_other_base().trained(), f), "the base models differ: .* of lin0"),
    "another method": (
        lambda f: get_peft_model(mlp(), LoraConfig(target_modules=["lin0"])).save_pretrained(f),
        "only adapters of DVoRA",
    ),
    "untrained": (lambda f: saved(HEADED.fresh(), f), "it changes nothing; pass allow_unchanged=True"),
    "without a direction": (
        lambda f: rewrite(saved(HEADED.fresh(), f), lambda k, v: v + ("lambda_b" in k) - v * ("lambda_d" in k)),
        "it changes nothing",
    ),
    "not finite": (
        lambda f: rewrite(saved(HEADED.trained(), f), lambda k, v: v.fill_(torch.nan) if "lin1" in k else v),
        "lin1.dvora_magnitude has values that are not finite",
    ),
    "a head that is not finite": (
        lambda f: rewrite(saved(HEADED.trained(), f), lambda k, v: v.fill_(torch.inf) if "lin2" in k else v),
        "lin2.weight has values that are not finite",
    ),
    "truncated": (
        lambda f: (saved(HEADED.trained(), f) / VALUES).write_bytes((f / VALUES).read_bytes()[:-9]),
        "truncated or damaged",
    ),
    "no folder": (lambda f: None, "there is no file adapter_config.json"),
    "settings that are none": (lambda f: (saved(HEADED.trained(), f) / SETTINGS).write_text("["), "cannot be read"),
}


def of_other_base() -> Kind:
    def other() -> nn.Module:
        model = mlp()
        with torch.no_grad():
            model.lin0.weight.mul_(1.5)
        return model

    return HEADED._replace(base=other)


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    values = load_file(folder / VALUES)
    save_file({key: change(key, value).contiguous() for key, value in values.items()}, folder / VALUES)
    return folder


@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_a_wrong_adapter_is_refused_by_name_and_reason(name: str, served: Served, tmp_path: Path) -> None:
    make, message = WRONG_ADAPTERS[name]
    make(tmp_path / "wrong")
    bank, before = served.bank, served.bank.stats()
    with refused((ValueError, TypeError), message):
        bank.add("new", tmp_path / "wrong")
    with refused((ValueError, TypeError), message):
        bank.replace("a", tmp_path / "wrong")
    assert bank.stats() == before


@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_a_wrong_first_adapter_leaves_the_model_alone(name: str, these: Tenants, tmp_path: Path) -> None:
    make, _message = WRONG_ADAPTERS[name]
    make(tmp_path / "wrong" / "x")
    model = these.base()
    with dvora.AdapterBank(model) as bank:
        try:
            bank.add("x", tmp_path / "wrong" / "x")
        except (ValueError, TypeError):
            # Whatever it was, neither the model nor the bank remember it.
            assert same_bits(outputs(model), outputs(these.base()))
        else:
            bank.remove("x")
            return
        bank.add_folder(these.folder)
        found = Served(model, bank)(NAMES)
    alone = row_by_row(lambda each: outputs(these.alone(each)), NAMES)
    assert worst_difference(found, alone) < 1e-5


def test_a_wrong_adapter_among_many_adds_none(these: Tenants, served: Served, tmp_path: Path) -> None:
    for name in ("d", "e", "f"):
        shutil.copytree(these.path("a"), tmp_path / name)
    saved(HEADED.trained(projection_seed=1), tmp_path / "e")
    with refused(ValueError, "adapter 'e': .*projection_seed is 0 here and 1 there"):
        served.bank.add_folder(tmp_path)
    write_pack(tmp_path / "pack", {name: tmp_path / name for name in ("d", "e", "f")})
    with refused(ValueError, "adapter 'e': .*projection_seed is 0 here and 1 there"):
        served.bank.add_pack(tmp_path / "pack")
    shutil.rmtree(tmp_path / "e")
    shutil.copytree(these.path("a"), tmp_path / "a")
    with refused(ValueError, "name: there is an adapter 'a' already; use bank.replace"):
        served.bank.add_folder(tmp_path)


def test_a_wrong_value_in_a_folder_of_many_is_found_at_the_first_use(
    served: Served, these: Tenants, tmp_path: Path
) -> None:
    shutil.copytree(these.path("a"), tmp_path / "bad")
    rewrite(tmp_path / "bad", lambda _, value: value.fill_(torch.nan))
    served.bank.add_folder(tmp_path)
    for use in (lambda: served(["bad", "a"]), lambda: served.bank.prefetch(["a", "bad"]).result()):
        with refused(ValueError, "adapter 'bad': .* has values that are not finite"):
            use()
    with refused(ValueError, "adapter 'bad'"):
        served.bank.pin(["bad"])
    assert served.bank.stats().pinned == 0
    served.bank.remove("bad")


def test_an_unchanged_adapter_of_a_folder_or_a_pack_is_never_served_in_silence(
    these: Tenants, served: Served, tmp_path: Path
) -> None:
    saved(HEADED.fresh(), tmp_path / "folder" / "fresh")
    write_pack(tmp_path / "pack", {"packed": tmp_path / "folder" / "fresh"})
    served.bank.add("allowed", tmp_path / "folder" / "fresh", allow_unchanged=True)
    served.bank.add_folder(tmp_path / "folder")
    served.bank.add_pack(tmp_path / "pack")
    for name in ("fresh", "packed"):
        with refused(ValueError, f"adapter '{name}': it changes nothing"):
            served([name] * 4)
    # Its head is the base's, in a batched product.
    assert worst_difference(served(["allowed"] * 4), served([None] * 4)) < 1e-6
    for name in ("allowed", "fresh", "packed"):
        served.bank.remove(name)


def test_a_folder_that_changes_is_refused_until_it_is_replaced(these: Tenants, tmp_path: Path) -> None:
    shutil.copytree(these.path("a"), tmp_path / "a")
    shutil.copytree(these.path("b"), tmp_path / "b")
    model = these.base()
    one = 4 * (2 * 24 + 4) * 2 + 4 * 24 * 6
    with dvora.AdapterBank(model, slots=1, host_bytes=one) as bank:
        bank.add_folder(tmp_path)
        served = Served(model, bank)
        before = served(["a"] * 4)
        change_values(tmp_path / "a", 3)
        assert torch.equal(served(["a"] * 4), before)
        served(["b"] * 4)
        with refused(ValueError, "adapter 'a': it has other values than when it was first used; call bank.replace"):
            served(["a"] * 4)
        bank.replace("a", tmp_path / "a")
        assert not torch.equal(served(["a"] * 4), before)
        saved(HEADED.trained(projection_seed=1), tmp_path / "a")
        served(["b"] * 4)
        with refused(ValueError, "adapter 'a': .*another adapter than when it was added"):
            served(["a"] * 4)
        shutil.rmtree(tmp_path / "a")
        with refused(ValueError, "adapter 'a': .* no longer there"):
            served(["a"] * 4)
        assert bank.stats().slots_in_use == 0


def test_a_pack_that_is_truncated_or_none(these: Tenants, served: Served, tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", {"x": these.path("a")})
    whole = (tmp_path / "pack").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-5])
    (tmp_path / "text").write_text("no pack")
    for name in ("cut", "text"):
        with refused(ValueError, name):
            served.bank.add_pack(tmp_path / name)
    with refused(ValueError, "is not a file"):
        served.bank.add_pack(tmp_path)
    with refused(TypeError, "file must be a path, got None"):
        served.bank.add_pack(None)


def test_a_pack_that_is_cut_off_while_it_is_open(these: Tenants, served: Served, tmp_path: Path) -> None:
    for seed, name in enumerate(("x", "y"), start=7):
        saved(HEADED.trained(seed), tmp_path / name)
    write_pack(tmp_path / "pack", {name: tmp_path / name for name in ("x", "y")})
    served.bank.add_pack(tmp_path / "pack")
    with (tmp_path / "pack").open("r+b") as file:
        file.truncate(len((tmp_path / "pack").read_bytes()) // 2)
    with refused(ValueError, "adapter 'y': .*(cut off|damaged)"):
        served(["y"] * 4)
    for name in ("x", "y"):
        served.bank.remove(name)


def test_wrong_sources(served: Served, these: Tenants) -> None:
    vector = Layout.of(these.path("a")).to_vector(these.path("a"))
    for source, error, message in [
        (None, TypeError, "source must be a path or a flat vector, got None"),
        (3, TypeError, "source must be a path or a flat vector, got 3"),
        (vector.tolist(), TypeError, "source must be a path or a flat vector"),
        (vector[1:], ValueError, r"vector has shape \(\d+,\), expected"),
        (vector.double(), TypeError, "vector is torch.float64, expected a tensor of torch.float32"),
        (vector.index_fill(0, torch.tensor([0]), torch.nan), ValueError, "lin0.dvora_magnitude has values"),
    ]:
        with refused(error, message):
            served.bank.add("new", source)
        with refused(error, message):
            served.bank.replace("a", source)


def test_a_vector_before_it_is_known_what_it_is_of() -> None:
    with refused(ValueError, "does not know yet what a vector is of; add the folder of an adapter first, or pass like"):
        dvora.AdapterBank(mlp()).add("a", torch.zeros(3))


def test_a_folder_without_adapters(served: Served, these: Tenants, tmp_path: Path) -> None:
    with refused(ValueError, "has no folders with adapters in it"):
        served.bank.add_folder(tmp_path)
    with refused(ValueError, "it is an adapter itself, name the folder around it"):
        served.bank.add_folder(these.path("a"))
    with refused(OSError, "nowhere"):
        served.bank.add_folder(tmp_path / "nowhere")
    with refused(TypeError, "folder must be a path, got 3"):
        served.bank.add_folder(3)


def test_what_half_precision_cannot_hold(these: Tenants, tmp_path: Path) -> None:
    saved(HEADED.trained(), tmp_path / "a")
    rewrite(tmp_path / "a", lambda key, value: value * 1e7 if "lin1.dvora_magnitude" in key else value)
    model = these.base()
    bank = dvora.AdapterBank(model, dtype=torch.float16, like=these.path("a"))
    with refused(ValueError, "adapter 'a': the adapter has factors up to .*, which torch.float16 cannot hold"):
        bank.add("a", tmp_path / "a")
    with dvora.AdapterBank(these.base(), dtype=torch.bfloat16, like=these.path("a")) as bank:
        bank.add("a", tmp_path / "a")
    half = tenants(HEADED, tmp_path / "half", 1, torch.float16)
    values = load_file(half.path("a") / VALUES)
    save_file(
        {key: value.float() * (1e6 if "lin2" in key else 1) for key, value in values.items()}, half.path("a") / VALUES
    )
    with refused(
        ValueError, "adapter 'a': the adapter has values in its head, lin2.weight, that torch.float16, .* cannot hold"
    ):
        dvora.AdapterBank(half.base()).add("a", half.path("a"))


def test_settings_are_of_json_that_is_another_s(these: Tenants, served: Served, tmp_path: Path) -> None:
    shutil.copytree(these.path("a"), tmp_path / "x")
    settings = json.loads((tmp_path / "x" / SETTINGS).read_text())
    (tmp_path / "x" / SETTINGS).write_text(json.dumps({**settings, "projection_fingerprint": "0" * 16}))
    with refused(ValueError, "x: projection_fingerprint is '0000000000000000', but projection_seed=0"):
        served.bank.add_folder(tmp_path)
