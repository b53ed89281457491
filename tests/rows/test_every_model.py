"""In a bank, every row of every model that transformers has is what its adapter makes of it alone.

Three adapters, of all layers, of the upper half, of the last one; rows of one text and of many, padded, as many as
tokens, and more than go through a block at a time; with all states and attentions asked for; with dropout alone in
training mode. Compared with the base in which PEFT has put the adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import dvora
from dvora import blocks
from dvora.rows import shared
from tests.peft.tiny import train_vectors
from tests.rows.tiny_configs import ROWS, LeftOutError, family_of, inputs, kinds, tiny

# Of hundreds of models that are made here with sizes that nobody else gives them.
pytestmark = pytest.mark.filterwarnings("ignore")

PARTS, OTHERS = 8, 8
NAMES = ["all", "last", "upper", None, "last", "all", "upper", "upper", None, "last"]
"""Of rows: no number that models have of tokens in a text or an image."""


def compare(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare one model in each of the batches."""
    model = tiny(kind)
    alone = save(model, folder)
    dropouts = [m for base in (model, *alone.values()) for m in base.modules() if isinstance(m, nn.Dropout)]
    with dvora.AdapterBank(model, like=folder / "all") as bank, torch.inference_mode():
        bank.add_folder(folder)
        for what, batch in batches(model):
            for module in dropouts:
                module.training, module.p = what == "dropout", 1.0
            values = next(iter(batch.values()))
            monkeypatch.setattr(shared, "PORTION", 2 * 32 * values[0].numel() if what == "portions" else 2**30)
            with bank.rows(NAMES):
                found = tensors(model(**batch))
            for name in {*NAMES}:
                expected = tensors(alone[name](**batch))
                rows = [row for row, other in enumerate(NAMES) if other == name]
                assert [t.shape for t in found] == [t.shape for t in expected], (what, name)
                for ours, theirs in zip(found, expected, strict=True):
                    if len(theirs) == len(NAMES) and theirs.is_floating_point():
                        torch.testing.assert_close(
                            ours[rows], theirs[rows], rtol=1e-4, atol=1e-4, equal_nan=True, msg=f"{what}, {name}"
                        )


def save(model: nn.Module, folder: Path) -> dict[str | None, nn.Module]:
    """Three adapters in folders of their names, each with the base that PEFT has put it in, and the base alone."""
    has_rows = dict[str, bool]()

    def note(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        has_rows[name] = has_rows.get(name, True) and bool(args) and output.dim() > 1 and len(args[0]) == ROWS

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    with torch.no_grad():
        model(**inputs(model, ROWS))
    for handle in handles:
        handle.remove()
    assert all(has_rows.values()) or not blocks.with_rows_first(model)
    # In the order in which they are called.
    layers = [name for name in has_rows if has_rows[name]]
    if not layers:
        raise LeftOutError("no linear layer of it is called with rows")
    alone = {None: copy.deepcopy(model)}
    for seed, (name, count) in enumerate((("all", len(layers)), ("upper", (len(layers) + 1) // 2), ("last", 1))):
        config = dvora.DVoRAConfig(r=4, target_modules=layers[-count:])
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
        train_vectors(adapted, seed=seed)
        adapted.save_pretrained(folder / name)
        alone[name] = adapted
    return alone


def batches(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of as many rows as there are names."""
    many, one = inputs(model, len(NAMES)), inputs(model, 1)
    equal = {name: value.repeat(len(NAMES), *[1] * (value.dim() - 1)) for name, value in one.items()}
    # First the one that shows which dimension has the rows.
    yield "many", many
    if takes(model, one | {"use_cache": True}):
        yield "with a cache", equal | {"use_cache": True}
    yield "one text", equal
    yield "portions", many
    yield "dropout", equal
    if "input_ids" in many:
        yield "as many rows as tokens", inputs(model, len(NAMES), len(NAMES))
        mask = torch.ones_like(equal["input_ids"])
        mask[::3, -2:] = 0
        if takes(model, padded := equal | {"attention_mask": mask}):
            yield "padded", padded
    asked = {"output_hidden_states": True, "output_attentions": True}
    yield "all outputs", equal | (asked if takes(model, asked | one) else {})


def takes(model: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a model can be called so, alone."""
    try:
        return bool(copy.deepcopy(model)(**arguments))
    except Exception:  # whatever any class of transformers may raise
        return False


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors in outputs."""
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("part", range(PARTS))
def test_every_row_is_what_its_adapter_makes_of_it(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of all families that are said to be known, and of some of the others; of all in long runs."""
    left_out, wrong, count = dict[str, str](), dict[str, str](), 0
    is_long = request.config.getoption("--fuzz")
    chosen = [k for n, k in enumerate(kinds()) if is_long or family_of(k) in blocks.ROWS_FIRST or n % OTHERS == 0]
    for kind in chosen[part::PARTS]:
        try:
            compare(kind, tmp_path / kind, monkeypatch)
            count += 1
        except LeftOutError as reason:
            left_out[kind] = str(reason)
        except Exception as error:  # of the models after it too
            wrong[kind] = f"{type(error).__name__}: {error}"
    print(f"{count} models compared, left out:", *(f"{kind}: {why}" for kind, why in left_out.items()), sep="\n    ")
    assert not wrong
    assert count > 5


@pytest.mark.parametrize("family", blocks.KNOWN)
def test_every_known_block_is_compared(family: str) -> None:
    lists = [of_list for kind in kinds() if family_of(kind) == family for of_list in lists_of(kind)]
    assert lists, f"transformers has no blocks of the family {family} any more"


def lists_of(kind: str) -> list[nn.ModuleList]:
    """Of known blocks, in a model that can be compared."""
    try:
        return blocks.known_lists(tiny(kind))
    except LeftOutError:
        return []
