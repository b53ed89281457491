"""Adapters of LoRA beside those of DVoRA: each row is what PEFT gives for its adapter alone."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

import dvora
from dvora.adapter_file.packs import write_pack
from dvora.rows.gathered import GatheredRows
from tests.bank.tenants import BERT, HEADED, LLAMA, Kind, tenants
from tests.peft.kinds import WEIGHTS, edit_config, edit_weights
from tests.peft.lora import lora
from tests.peft.tiny import LAYERS, MODELS, inputs, outputs
from tests.rows.products import Products

HEAD = {"modules_to_save": ["classifier"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "r=8": {"r": 8, "target_modules": LAYERS["bert"]},
    "r=1, queries": {"r": 1, "lora_alpha": 3, "target_modules": ["query"]},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["query", "value"]},
    "patterns": {
        "r": 4,
        "target_modules": LAYERS["bert"],
        "rank_pattern": {"query": 6, r"layer\.1\..*value": 2},
        "alpha_pattern": {"layer.0.attention.self.query": 9},
    },
    "the last block": {"r": 2, "target_modules": ["query", "dense"], "layers_to_transform": [1]},
}


def one(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter of BERT."""
    return lora(BERT.base(), folder, seed, **HEAD, **{"r": 3, "target_modules": ["query"], **settings})


def alone(kind: Kind, folder: Path | None, rows: int) -> Tensor:
    model: nn.Module = kind.base()
    return outputs(model if folder is None else PeftModel.from_pretrained(model, folder).eval(), rows)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, dict[str | None, Path | None]]:
    """Adapters of both methods on one base."""
    folder = tmp_path_factory.mktemp("mixed")
    of_dvora = tenants(BERT, folder / "dvora", 2)
    folders: dict[str | None, Path | None] = {name: of_dvora.path(name) for name in of_dvora.names}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        folders[name] = lora(BERT.base(), folder / str(seed), seed, **HEAD, **config)
    return BERT, {**folders, None: None}


def bank_of(model: nn.Module, folders: dict[str | None, Path | None], **settings: Any) -> dvora.AdapterBank:
    given = {name: folder for name, folder in folders.items() if name is not None and folder is not None}
    bank = dvora.AdapterBank(model, like=next(iter(given.values())), own_heads=True, **settings)
    for name, folder in given.items():
        bank.add(name, folder)
    return bank


def test_every_row_is_what_peft_gives(mixed: tuple[Kind, dict[str | None, Path | None]]) -> None:
    kind, folders = mixed
    expected = {name: alone(kind, folder, len(folders)) for name, folder in folders.items()}
    model = kind.base()
    with bank_of(model, folders) as bank, torch.no_grad():
        batch = inputs(model, len(folders))

        @given(st.data())
        def check(data: st.DataObject) -> None:
            # Also of few adapters and few texts, so that rows are equal.
            some = data.draw(st.lists(st.sampled_from([*folders]), min_size=1))
            names = data.draw(st.lists(st.sampled_from(some), min_size=1, max_size=12))
            texts = [data.draw(st.integers(0, data.draw(st.sampled_from([0, len(folders) - 1])))) for _ in names]
            with bank.rows(names):
                found = model(**{key: x[texts] for key, x in batch.items()}).logits
            rows = torch.stack([expected[name][text] for name, text in zip(names, texts, strict=True)])
            torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-5)

        check()
        with bank.rows([*folders]):
            found = model(**batch).logits
        rows = torch.stack([expected[name][row] for row, name in enumerate(folders)])
        torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-5)


EVERY_LINEAR = ["query", "key", "value", "dense"]
TARGETS: list[Any] = [
    *(EVERY_LINEAR, EVERY_LINEAR[1:], ["query", "value"], ["query", "key", "value", "output.dense"], ["query", "lost"]),
    *("all-linear", "All-Linear", None, r".*\.(query|key|value|dense)", r".*layer\.1\..*(query|dense)", "lost"),
]
"""Also what PEFT takes of BERT by itself."""
EXCLUDED = [None, ["value"], ["layer.0.attention.self.query", "pooler.dense"], r".*layer\.0\..*", r".*pooler.*", "lost"]
IN_BLOCKS = [{}, {}, {"layers_to_transform": 1}, {"layers_to_transform": [0, 1], "layers_pattern": "layer"}]
HEADS = [["classifier"], ["classifier", "pooler"], ["classifier", "layer.0.intermediate"]]


def layers_in(folder: Path) -> set[str]:
    keys = [key.removeprefix("base_model.model.") for key in load_file(folder / WEIGHTS)]
    return {key.partition(".lora_")[0] for key in keys if ".lora_" in key}


def test_settings_and_file_that_were_edited_are_what_peft_gives_or_refused(tmp_path: Path) -> None:
    path = lora(BERT.base(), tmp_path / "whole", **HEAD, target_modules=EVERY_LINEAR)
    outcomes = set()

    @settings(max_examples=20)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        def draw(values: list[Any]) -> Any:
            return data.draw(st.sampled_from([*values[:1] * 3, *values]))

        edits = {"target_modules": draw(TARGETS), "exclude_modules": draw(EXCLUDED), "modules_to_save": draw(HEADS)}
        edits |= draw(IN_BLOCKS)
        lost, allow_partial = draw([None, "layer.0.", "value", "pooler", "intermediate"]), data.draw(st.booleans())
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            edited = Path(shutil.copytree(path, folder, dirs_exist_ok=True))
            # What is missing starts without a change.
            edit_config(edited, **edits, init_lora_weights=True)
            state, head = BERT.base().state_dict(), f"{edits['modules_to_save'][-1]}."
            parts = {f"base_model.model.{key}": value for key, value in state.items() if head in f".{key}"}
            edit_weights(edited, lambda t: [t.pop(key) for key in [*t] if lost is not None and lost in key])
            edit_weights(edited, lambda t: t.update({**parts, **t}))
            try:
                peft = PeftModel.from_pretrained(BERT.base(), edited).eval()
            except (ValueError, RuntimeError):
                there = None
            else:
                there = {n[17:] for n, module in peft.named_modules() if isinstance(module, BaseTunerLayer)}
            here = layers_in(edited)
            is_right = there is not None and (here <= there if allow_partial else here == there)
            outcomes.add(is_right)
            model = BERT.base()
            if not is_right:
                with (
                    pytest.raises(ValueError, match=f"{edited.name}|'edited'|like"),
                    dvora.AdapterBank(model, like=edited) as bank,
                ):
                    bank.add("edited", edited, allow_partial=allow_partial)
                return
            with dvora.AdapterBank(model, like=edited, own_heads=True) as bank:
                bank.add("edited", edited, allow_partial=allow_partial)
                with bank.rows(["edited", None, "edited", None]):
                    found = outputs(model)
            expected = torch.where(torch.tensor([[True], [False]] * 2), outputs(peft), outputs(BERT.base()))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    check()
    assert outcomes == {True, False}


def test_rows_of_others_keep_their_bits(mixed: tuple[Kind, dict[str | None, Path | None]]) -> None:
    kind, folders = mixed
    model, names = kind.base(), [*folders]
    with bank_of(model, folders) as bank:
        with bank.rows(names):
            found = outputs(model, len(names))
        with bank.rows([None if name in CONFIGS else name for name in names]):
            without = outputs(model, len(names))
    for row, name in enumerate(names):
        assert torch.equal(found[row], without[row]) is (name not in CONFIGS), name


def test_texts_are_generated_beside_adapters_of_dvora(tmp_path: Path) -> None:
    folders: dict[str | None, Path | None] = {None: None, "a": tenants(LLAMA, tmp_path / "dvora", 1).path("a")}
    for seed, (name, targets) in enumerate({"l": LAYERS["llama"], "all": "all-linear"}.items()):
        folders[name] = lora(LLAMA.base(), tmp_path / name, seed, r=3, target_modules=targets)
    model = LLAMA.base()
    settings = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    names = ["all", "l", "a", None, "l"]
    batch = inputs(model, len(names))
    with bank_of(model, folders) as bank:
        with bank.rows(names):
            found = model.generate(**batch, **settings)
        for row, name in enumerate(names):
            folder = folders[name]
            peft = LLAMA.base() if folder is None else PeftModel.from_pretrained(LLAMA.base(), folder).eval()
            expected = peft.generate(**{key: x[row : row + 1] for key, x in batch.items()}, **settings)
            assert torch.equal(found[row : row + 1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_lora_over_another_dtype_is_rounded_where_peft_rounds(dtype: torch.dtype, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return MODELS["mlp"]().to(dtype)

    folders: dict[str | None, Path | None] = {None: None}
    for of_file in (torch.float32, torch.bfloat16, torch.float16):
        name, settings = str(of_file), {"r": 8, "lora_alpha": 8 + 3 * len(folders), "target_modules": ["lin1"]}
        folders[name] = lora(MODELS["mlp"](), tmp_path / name, len(folders), **settings)
        change("", lambda x, of_file=of_file: x.to(of_file))(folders[name])
    names, (x,) = [*folders, *folders], inputs(base(), 2 * len(folders)).values()
    model = base().requires_grad_(False)
    # Of the layer itself: what comes behind it rounds again.
    seen: list[Tensor] = []
    alone = {}
    for name, folder in folders.items():
        peft = base() if folder is None else PeftModel.from_pretrained(base(), folder).eval()
        peft.get_submodule("lin1" if folder is None else "base_model.model.lin1").register_forward_hook(
            lambda *call: seen.append(call[-1].detach().clone())
        )
        with torch.no_grad():
            peft(x)
        alone[name] = seen[-1]
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    one_rounding = torch.finfo(dtype).eps * (4 if dtype == torch.float64 else 1)
    with bank_of(model, folders) as bank, bank.rows(names):
        model.lin1.register_forward_hook(lambda *call: seen.append(call[-1].detach().clone()))
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                model(x.clone().requires_grad_(recorded))
            torch.testing.assert_close(seen[-1], expected, rtol=one_rounding, atol=one_rounding)
            assert (seen[-1] != expected).float().mean() < 0.01 or dtype == torch.float64


def test_inputs_get_the_gradients_that_peft_gives(tmp_path: Path) -> None:
    settings = {"r": 3, "target_modules": ["lin0", "lin1"], "modules_to_save": ["lin2"]}
    folder = lora(HEADED.base(), tmp_path / "other", **settings)
    folders = {"a": tenants(HEADED, tmp_path / "dvora", 1).path("a"), "other": folder, None: None}
    names = ["other", None, "a", "other"]
    x = inputs(HEADED.base())["x"].requires_grad_()
    model = HEADED.base().requires_grad_(False)
    with bank_of(model, dict(folders)) as bank, bank.rows(names):
        with torch.inference_mode():
            model(x)
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    for row, name in enumerate(names):
        path = folders[name]
        peft = HEADED.base() if path is None else PeftModel.from_pretrained(HEADED.base(), path).eval()
        (expected,) = torch.autograd.grad(peft(x)[row].square().sum(), x)
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-5)


def test_layers_whose_weight_is_transposed(tmp_path: Path) -> None:
    base = MODELS["gpt2"]
    folder = lora(base(), tmp_path, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    model = base().eval()
    with bank_of(model, {"l": folder}) as bank, bank.rows(["l", "l", None, "l"]):
        found = outputs(model)
    expected = outputs(PeftModel.from_pretrained(base(), folder).eval())
    torch.testing.assert_close(found[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-5, atol=1e-5)


def test_one_text_shares_the_blocks_below(mixed: tuple[Kind, dict[str | None, Path | None]]) -> None:
    kind, folders = mixed
    model, name = kind.base(), "the last block"
    products = Products(model.bert.encoder.layer)
    batch = {key: x[:1].repeat(3, 1) for key, x in inputs(model).items()}
    with bank_of(model, folders) as bank, torch.no_grad(), bank.rows([name, name, None]), products:
        found = model(**batch).logits
    assert products.rows[0] == 1
    expected = alone(kind, folders[name], 4)[0]
    torch.testing.assert_close(found[:2], torch.stack([expected, expected]), rtol=1e-5, atol=1e-5)


class Shifted(nn.Module):
    """A linear layer that gets rows, and one that gets a table of another number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.of_rows, self.of_table = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.ones(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rows(x) + self.of_table(self.table).sum(0)


def test_layers_that_nobody_adapts_may_get_something_else_than_rows(tmp_path: Path) -> None:
    base = Shifted().requires_grad_(False)
    lora(copy.deepcopy(base), tmp_path, target_modules=["of_rows"])
    x = torch.arange(12.0).view(3, 4)
    expected = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x).detach()
    with bank_of(base, {"l": tmp_path}) as bank, torch.no_grad(), bank.rows(["l", None, "l"]):
        found = base(x)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)


def test_packs_and_replacements(tmp_path: Path) -> None:
    paths = {name: one(tmp_path / name, seed) for seed, name in enumerate("ab")}
    write_pack(tmp_path / "both.dvora", paths)
    model = BERT.base()
    with dvora.AdapterBank(model, slots=1, like=paths["a"]) as bank, torch.no_grad():
        assert bank.add_pack(tmp_path / "both.dvora") == ["a", "b"]
        for name in ("a", "b", "a"):
            with bank.rows([name] * 4):
                torch.testing.assert_close(outputs(model), alone(BERT, paths[name], 4), rtol=1e-5, atol=1e-5)
        before = bank.digest("a")
        bank.replace("a", paths["b"])
        assert bank.digest("a") == bank.digest("b") != before


def test_settings_that_change_what_is_computed_are_in_the_digest(tmp_path: Path) -> None:
    path = one(tmp_path / "a")
    with bank_of(BERT.base(), {"a": path}) as bank:
        before = bank.digest("a")
        edit_config(path, lora_alpha=9)
        assert bank.digest_of(path) != before


def test_of_one_adapter_nothing_is_copied(tmp_path: Path) -> None:
    path, layer = one(tmp_path), "bert.encoder.layer.0.attention.self"
    with bank_of(BERT.base(), {"a": path}) as bank, bank.rows(["a"] * 4) as batch:
        rows: GatheredRows = batch.rows
        ((who, factors),) = rows.low_rank(f"{layer}.query", 4)
        assert who is None
        assert {len(factor) for factor in factors} == {1}
        assert rows.low_rank(f"{layer}.value", 4) == []


def test_they_are_served_and_not_trained(tmp_path: Path) -> None:
    these, path = tenants(BERT, tmp_path / "dvora", 1), one(tmp_path / "l")
    with bank_of(BERT.base().requires_grad_(False), {"l": path}) as bank:
        with pytest.raises(ValueError, match="the bank has no adapter of DVoRA"):
            bank.trainable(["l"])
        with pytest.raises(ValueError, match="one of lora has none"):
            bank.replace("l", torch.ones(9))
        with pytest.raises(ValueError, match="the layers served are those of an adapter that is not; begin with like="):
            bank.add("a", these.path("a"))
    folders: dict[str | None, Path | None] = {"a": these.path("a"), "l": path}
    with (
        bank_of(BERT.base().requires_grad_(False), folders) as bank,
        pytest.raises(ValueError, match="'l' is of lora, which is served here and not trained"),
    ):
        bank.trainable(["l", "a"])


def config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **values)


def change(end: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    """Other values with keys of that end."""
    return lambda folder: edit_weights(
        folder, lambda tensors: tensors.update({key: edit(x) for key, x in tensors.items() if key.endswith(end)})
    )


def renamed(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: edit_weights(
        folder, lambda tensors: tensors.update({k.replace(old, new): tensors.pop(k) for k in [*tensors] if old in k})
    )


def without(part: str) -> Callable[[Path], object]:
    return lambda folder: edit_weights(
        folder, lambda tensors: [tensors.pop(key) for key in [*tensors] if part in key and "layer.1" not in key]
    )


def both(*edits: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [edit(folder) for edit in edits]


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (config(use_dora=True), "use_dora=True is not served"),
    "biases": (config(bias="all"), "bias='all' is not served"),
    "another base": (config(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the base itself"),
    "replicated layers": (config(layer_replication=[[0, 2]]), "layer_replication"),
    "another rank": (config(r=4), "has rank 3, and another one in r"),
    "an endless expression": (config(alpha_pattern={"(.+)+!": 2}), "alpha_pattern: .* could take more than"),
    "an embedding": (renamed("lora_A.weight", "lora_embedding_A"), "lora_embedding_A is of no linear layer"),
    "another width": (
        change("lora_A.weight", lambda x: x[:, :-1].clone()),
        "32 outputs and 32 inputs in the model, and 32 and 31 in the adapter: another base",
    ),
    "a convolution": (change("lora_B.weight", lambda x: x[..., None, None]), ".out, r. of a linear layer"),
    "half a layer": (without("lora_B"), "query has no lora_B.weight"),
    "no layer": (
        both(renamed("query", "other"), config(target_modules=["other"])),
        "other, which is no linear layer of the model",
    ),
    "a layer that is not targeted": (
        config(target_modules=["value"]),
        r"0\.attention\.self\.query has factors in the file, and its settings leave the layer out",
    ),
    "a layer that is excluded": (config(exclude_modules=r".*1\..*"), r"1\.attention\.self\.query has factors"),
    "a layer of another block": (config(layers_to_transform=[1]), r"0\.attention\.self\.query has factors"),
    "a layer in a head": (config(modules_to_save=["classifier", "self"]), r"self\.query has factors"),
    "a layer that all linear ones have": (
        config(target_modules="all-linear"),
        r"lacks bert\.encoder\.layer\.0\.attention\.output\.dense, which its settings name; .* allow_partial=True",
    ),
    "a layer of PEFT's default": (config(target_modules=None), r"lacks .*0\.attention\.self\.value, which its"),
    "no layer of PEFT's default": (config(target_modules=[]), "its settings leave the layer out"),
    "an endless target": (config(target_modules="(.+)+!"), "target_modules: .* could take more than"),
    "an endless exclusion": (config(exclude_modules="(.+)+!"), "exclude_modules: .* could take more than"),
    "endless names": (
        config(target_modules=[*map(str, range(4097))]),
        "name 4097 layers, expected at most 4096",
    ),
    "no names": (config(target_modules=1), "'int' is not iterable|not a container"),
    "not finite": (change("lora_B.weight", lambda x: x * torch.nan), "factors that are not finite"),
    "no head": (without("classifier"), "lacks classifier"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_more_than_lora_in_linear_layers_is_refused(what: str, tmp_path: Path) -> None:
    spoil, said = WRONG[what]
    path = one(tmp_path / "l")
    spoil(path)
    these = tenants(BERT, tmp_path / "dvora", 1)
    with these.bank() as served:
        with pytest.raises((ValueError, TypeError), match=said):
            served.bank.add("l", path)
        assert [*served.bank] == ["a"]


def test_the_head_of_a_task_has_no_factors(tmp_path: Path) -> None:
    path = lora(BERT.base(), tmp_path, r=3, target_modules=["query", "classifier"])
    edit_config(path, task_type="SEQ_CLS")
    with (
        dvora.AdapterBank(BERT.base(), like=one(tmp_path / "like")) as bank,
        pytest.raises(ValueError, match="classifier has factors in the file, and its settings leave the layer out"),
    ):
        bank.add("l", path)


def test_what_is_too_large_for_the_slots_is_refused(tmp_path: Path) -> None:
    path = one(tmp_path)
    with bank_of(BERT.base().bfloat16(), {"a": path}) as bank:
        before = bank.stats().device_bytes
        with bank.rows(["a"]):
            size = bank.stats().device_bytes - before
    said = f"take {size:,} bytes .* make a bank with more head_bytes or fewer slots"
    with (
        dvora.AdapterBank(BERT.base().bfloat16(), slots=4, head_bytes=4, like=path) as bank,
        pytest.raises(ValueError, match=said),
    ):
        bank.add("a", path)


def test_settings_that_peft_does_not_know_are_refused(tmp_path: Path) -> None:
    path = one(tmp_path)
    edit_config(path, mirrored=True)
    with (
        dvora.AdapterBank(BERT.base(), like=one(tmp_path / "like")) as bank,
        pytest.warns(UserWarning, match="mirrored"),
        pytest.raises(ValueError, match="mirrored=True is not served"),
    ):
        bank.add("l", path)
