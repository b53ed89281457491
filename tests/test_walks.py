"""How many files a reader must follow: those of the library that run in a step, an evaluation, a bank's batch, a load.

A file more on a walk is a reason to ask whether the code lives where it must; the numbers below may only fall. What
CONTRIBUTING tells of a step names every file of it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import dvora
from tests.peft.kinds import Kind, saved
from tests.peft.tiny import LAYERS, MODELS

LIBRARY = Path(dvora.__file__).parent
STEP, EVALUATION, BATCH, LOAD = 8, 7, 9, 17
"""The aim of the last one is 12."""


BERT = Kind(MODELS["bert"], {"r": 8, "target_modules": LAYERS["bert"]})


def ids() -> torch.Tensor:
    return torch.arange(4 * 16).view(4, 16) % 40


def files_of(call: Callable[[], object]) -> set[str]:
    """The files under `src/dvora` that run in a call that has run before."""
    call()
    call()
    paths: set[str] = set()
    sys.setprofile(lambda frame, event, _: paths.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {str(Path(path).relative_to(LIBRARY)) for path in paths if path.startswith(f"{LIBRARY}/")}


def check(what: str, files: set[str], limit: int) -> None:
    walk = f"{what}: {len(files)} files\n    " + "\n    ".join(sorted(files))
    print(f"\n{walk}")
    assert len(files) <= limit, walk


def told() -> str:
    """What CONTRIBUTING tells of a training step."""
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return page.partition("A training step runs")[2].partition("A saved value")[0]


@pytest.mark.parametrize("tokens", [2, 64], ids=["few tokens", "many tokens"])
def test_a_training_step(tokens: int) -> None:
    model, batch = BERT.fresh().train(), ids().flatten()[:tokens].view(-1, min(tokens, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        model(input_ids=batch).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    files = files_of(step)
    check(f"a training step of {tokens} tokens", files, STEP)
    assert not [name for name in files if f"`{name}`" not in told()]


def test_an_evaluation() -> None:
    model = BERT.fresh()
    files = files_of(torch.no_grad()(lambda: model(input_ids=ids())))
    check("an evaluation", files, EVALUATION)
    assert not [name for name in files if f"`{name}`" not in told()]


def test_a_batch_of_the_bank(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        saved(BERT.trained(seed), tmp_path / name)
    model = BERT.base()

    def batch() -> None:
        with torch.no_grad(), bank.rows(["a", "b", None, "a"]):
            model(input_ids=ids())

    with dvora.AdapterBank(model) as bank:
        bank.add_folder(tmp_path)
        check("a batch of the bank", files_of(batch), BATCH)


def test_a_load(tmp_path: Path) -> None:
    saved(BERT.fresh(), tmp_path)
    check("a load", files_of(lambda: PeftModel.from_pretrained(BERT.base(), tmp_path)), LOAD)
