"""Adapters of LoRA beside those of DVoRA: each row is what PEFT gives for its adapter alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import dvora
from dvora.adapter_file.packs import write_pack
from dvora.rows.gathered import GatheredRows
from tests.bank.tenants import BERT, LLAMA, Kind, tenants
from tests.peft.kinds import edit_config, edit_weights, saved
from tests.peft.tiny import LAYERS, MODELS, inputs, outputs

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


def lora(kind: Kind, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter that was trained, saved."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(kind.base(), LoraConfig(init_lora_weights=False, **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "classifier" in name:
                    parameter.add_(torch.randn_like(parameter))
    return saved(model, folder)


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
        folders[name] = lora(BERT, folder / str(seed), seed, **HEAD, **config)
    return BERT, {**folders, None: None}


def bank_of(model: nn.Module, folders: dict[str | None, Path | None], **settings: Any) -> dvora.AdapterBank:
    bank = dvora.AdapterBank(model, own_heads=True, **settings)
    for name, folder in folders.items():
        if name is not None and folder is not None:
            bank.add(name, folder)
    return bank


@pytest.mark.parametrize("first", ["a", "rslora"])
def test_every_row_is_what_peft_gives(mixed: tuple[Kind, dict[str | None, Path | None]], first: str) -> None:
    kind, folders = mixed
    expected = {name: alone(kind, folder, len(folders)) for name, folder in folders.items()}
    model = kind.base()
    with bank_of(model, {first: folders[first], **folders}) as bank, torch.no_grad():
        for names in ([*folders], [*CONFIGS], ["a", "r=8"], ["r=8"], ["r=8"] * 3, ["b", None, "patterns", "b"]):
            with bank.rows(names):
                found = model(**{key: x[: len(names)] for key, x in inputs(model, len(folders)).items()}).logits
            rows = torch.stack([expected[name][row] for row, name in enumerate(names)])
            torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-5)


def test_texts_are_generated_beside_adapters_of_dvora(tmp_path: Path) -> None:
    of_dvora = tenants(LLAMA, tmp_path / "dvora", 1)
    folders = {"a": of_dvora.path("a"), "l": lora(LLAMA, tmp_path / "l", r=3, target_modules=LAYERS["llama"])}
    model = LLAMA.base()
    settings = {"max_new_tokens": 6, "do_sample": False}
    batch = inputs(model, 3)
    with bank_of(model, dict(folders)) as bank:
        with bank.rows(["l", "a", "l"]):
            found = model.generate(**batch, **settings)
        for row, name in enumerate(["l", "a", "l"]):
            peft = PeftModel.from_pretrained(LLAMA.base(), folders[name]).eval()
            expected = peft.generate(**{key: x[row : row + 1] for key, x in batch.items()}, **settings)
            assert torch.equal(found[row : row + 1], expected)


def test_one_text_shares_the_blocks_below(mixed: tuple[Kind, dict[str | None, Path | None]]) -> None:
    kind, folders = mixed
    model = kind.base()
    counts = []
    model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    names = ["the last block", "the last block", None]
    batch = {key: x[:1].repeat(3, 1) for key, x in inputs(model).items()}
    with bank_of(model, folders) as bank, torch.no_grad(), bank.rows(names):
        found = model(**batch).logits
    assert counts == [1]
    expected = alone(kind, folders["the last block"], 4)[0]
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
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["of_rows"], init_lora_weights=False))
    saved(adapted, tmp_path)
    x = torch.arange(12.0).view(3, 4)
    with bank_of(base, {"l": tmp_path}) as bank, torch.no_grad(), bank.rows(["l", None, "l"]):
        found = base(x)
    torch.testing.assert_close(found[[0, 2]], adapted.eval()(x).detach()[[0, 2]], rtol=1e-5, atol=1e-5)


def test_packs_and_replacements(tmp_path: Path) -> None:
    paths = {
        name: lora(BERT, tmp_path / name, seed, r=3, target_modules=["query"], **HEAD) for seed, name in enumerate("ab")
    }
    write_pack(tmp_path / "both.dvora", paths)
    model = BERT.base()
    with dvora.AdapterBank(model, slots=1) as bank, torch.no_grad():
        assert bank.add_pack(tmp_path / "both.dvora") == ["a", "b"]
        for name in ("a", "b", "a"):
            with bank.rows([name] * 4):
                torch.testing.assert_close(outputs(model), alone(BERT, paths[name], 4), rtol=1e-5, atol=1e-5)
        before = bank.digest("a")
        bank.replace("a", paths["b"])
        assert bank.digest("a") == bank.digest("b") != before


def test_of_one_adapter_nothing_is_copied(tmp_path: Path) -> None:
    path = lora(BERT, tmp_path, r=3, target_modules=["query"], **HEAD)
    with bank_of(BERT.base(), {"a": path}) as bank, bank.rows(["a"] * 4) as batch:
        rows: GatheredRows = batch.rows
        who, (A, _) = rows.lora("bert.encoder.layer.0.attention.self.query", 4) or (None, (torch.empty(0), None))
        assert who is None
        assert A.shape == (1, 3, 32)
        assert rows.lora("bert.encoder.layer.0.attention.self.value", 4) is None


def config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **values)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (config(use_dora=True), "use_dora=True is not served"),
    "biases": (config(bias="all"), "bias='all' is not served"),
    "another base": (config(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the base itself"),
    "replicated layers": (config(layer_replication=[[0, 2]]), "layer_replication"),
    "another rank": (config(r=4), "has rank 3, and another one in r"),
    "an endless expression": (config(alpha_pattern={"(.+)+!": 2}), "alpha_pattern: .* could take more than"),
    "an embedding": (
        lambda folder: edit_weights(
            folder, lambda t: t.update({"base_model.model.embeddings.lora_embedding_A": torch.ones(3, 4)})
        ),
        "lora_embedding_A is of no linear layer",
    ),
    "another width": (
        lambda folder: edit_weights(
            folder, lambda t: t.update({key: x[:, :-1].clone() for key, x in t.items() if "lora_A" in key})
        ),
        "32 outputs and 32 inputs in the model, and 32 and 31 in the adapter: another base",
    ),
    "half a layer": (
        lambda folder: edit_weights(folder, lambda t: t.pop(next(key for key in t if "lora_B" in key))),
        "expected .r, in. and .out, r. of a linear layer",
    ),
    "no layer": (
        lambda folder: edit_weights(
            folder, lambda t: t.update({key.replace("query", "other"): t.pop(key) for key in [*t] if "query" in key})
        ),
        "other, which is no linear layer of the model",
    ),
    "not finite": (
        lambda folder: edit_weights(
            folder, lambda t: next(x for key, x in t.items() if "lora_B" in key).fill_(torch.nan)
        ),
        "factors that are not finite",
    ),
    "no head": (
        lambda folder: edit_weights(folder, lambda t: [t.pop(key) for key in [*t] if "classifier" in key]),
        "lacks classifier",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_more_than_lora_of_linear_layers_is_refused(what: str, tmp_path: Path) -> None:
    path = lora(BERT, tmp_path / "l", r=3, target_modules=["query"], **HEAD)
    spoil, said = WRONG[what]
    spoil(path)
    these = tenants(BERT, tmp_path / "dvora", 1)
    with these.bank() as served:
        with pytest.raises((ValueError, TypeError), match=said):
            served.bank.add("l", path)
        assert [*served.bank] == ["a"]


def test_what_is_too_large_for_the_slots_is_refused(tmp_path: Path) -> None:
    path = lora(BERT, tmp_path / "l", r=8, target_modules=["query"], **HEAD)
    with (
        dvora.AdapterBank(BERT.base(), slots=4, head_bytes=2**12) as bank,
        pytest.raises(ValueError, match="make a bank with more head_bytes or fewer slots"),
    ):
        bank.add("l", path)


def test_the_first_of_dvora_comes_between_batches(tmp_path: Path) -> None:
    these = tenants(BERT, tmp_path / "dvora", 1)
    path = lora(BERT, tmp_path / "l", r=3, target_modules=["query"], **HEAD)
    model = BERT.base()
    with bank_of(model, {"l": path}) as bank, torch.no_grad():
        with bank.rows(["l"] * 4):
            with pytest.raises(ValueError, match="comes between batches"):
                bank.add("a", these.path("a"))
            before = outputs(model)
        other = copy.deepcopy(these.path("a"))
        with pytest.raises(ValueError, match=r"classifier\.bias is absent here and shape"):
            bank.add("b", saved(Kind(MODELS["bert"], {"r": 3, "target_modules": ["query"]}).trained(), tmp_path / "b"))
        with bank.rows(["l"] * 4):
            assert torch.equal(outputs(model), before)
        bank.add("a", other)
        with bank.rows(["l", "a", "l", None]):
            found = outputs(model)
        torch.testing.assert_close(found[[0, 2]], before[[0, 2]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], alone(BERT, other, 4)[1], rtol=1e-5, atol=1e-5)
