"""How much a reader must follow: what of the library runs in a step, an evaluation, a bank's batch, a load.

A file, a function or a call more on a walk is a reason to ask whether the code lives where it must; the numbers may
only fall. What CONTRIBUTING tells of a step names every file of it.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel

import dvora
from tests.bank.versions import until
from tests.peft.kinds import Kind, saved
from tests.peft.tiny import LAYERS, MODELS
from tests.recipes import tiny_models
from tests.serve.served import save_classifiers, serving

LIBRARY = Path(dvora.__file__).parent


class Walk(NamedTuple):
    """Files, functions in them, and calls, of which some are of weak references and come when they come."""

    files: int
    functions: int
    calls: int


STEP, FEW_TOKENS, EVALUATION = Walk(8, 75, 981), Walk(8, 64, 1217), Walk(7, 44, 415)
REQUEST = Walk(25, 236, 929)
BATCH, LOAD = Walk(10, 85, 618), Walk(20, 224, 2826)

BERT = Kind(MODELS["bert"], {"r": 8, "target_modules": LAYERS["bert"]})


def ids() -> torch.Tensor:
    return torch.arange(4 * 16).view(4, 16) % 40


def check(what: str, call: Callable[[], object], limit: Walk) -> set[str]:
    """Hold what runs under `src/dvora` in a call that has run before to a limit; the files."""
    call()
    call()
    calls: list[tuple[str, str]] = []
    sys.setprofile(lambda frame, event, _: calls.append(_of(frame)) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return hold(what, calls, limit)


def hold(what: str, calls: Sequence[tuple[str, str]], limit: Walk) -> set[str]:
    """Hold calls of functions in files to a limit; the files."""
    own = [(str(Path(path).relative_to(LIBRARY)), name) for path, name in calls if path.startswith(f"{LIBRARY}/")]
    files = {path for path, _ in own}
    walk = Walk(len(files), len(set(own)), len(own))
    print(f"\n{what}: {walk}\n    " + "\n    ".join(sorted(files)))
    assert all(here <= most for here, most in zip(walk, limit, strict=True)), (walk, limit)
    return files


def _of(frame: FrameType) -> tuple[str, str]:
    return frame.f_code.co_filename, frame.f_code.co_qualname


def told() -> str:
    """What CONTRIBUTING tells of a training step."""
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return page.partition("A training step runs")[2].partition("A saved value")[0]


@pytest.mark.parametrize(("tokens", "limit"), [(2, FEW_TOKENS), (64, STEP)], ids=["few tokens", "many tokens"])
def test_a_training_step(tokens: int, limit: Walk) -> None:
    model, batch = BERT.fresh().train(), ids().flatten()[:tokens].view(-1, min(tokens, 16))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        model(input_ids=batch).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    files = check(f"a training step of {tokens} tokens", step, limit)
    assert not [name for name in files if f"`{name}`" not in told()]


def test_an_evaluation() -> None:
    model = BERT.fresh()
    files = check("an evaluation", torch.no_grad()(lambda: model(input_ids=ids())), EVALUATION)
    assert not [name for name in files if f"`{name}`" not in told()]


def test_a_batch_of_the_bank(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        saved(BERT.trained(seed), tmp_path / name)
    model = BERT.base()

    def batch() -> None:
        with torch.no_grad(), bank.rows(["a", "b", None, "a"]):
            model(input_ids=ids())

    with dvora.AdapterBank(model, like=tmp_path / "a") as bank:
        bank.add_folder(tmp_path)
        check("a batch of the bank", batch, BATCH)


def test_a_load(tmp_path: Path) -> None:
    saved(BERT.fresh(), tmp_path)
    check("a load", lambda: PeftModel.from_pretrained(BERT.base(), tmp_path), LOAD)


def test_a_request_of_the_server(tmp_path: Path) -> None:
    """In all its threads: that of the loop, those that read texts and write answers, and the engine's."""
    base = tiny_models.bert(tmp_path / "bert")
    save_classifiers(base, tmp_path / "adapters")
    calls, is_asking = list[tuple[str, str]](), threading.Event()
    threading.setprofile(
        lambda frame, event, _: calls.append(_of(frame)) if event == "call" and is_asking.is_set() else None
    )
    try:
        with serving(base, tmp_path / "adapters") as (client, server):

            def ask() -> None:
                client.post("/v1/classify", json={"model": "two", "input": "good"}).raise_for_status()
                # The engine lets go of its last batch when it has nothing to do.
                until(lambda: server.base.bank.stats().slots_in_use == 0)

            ask()
            ask()
            is_asking.set()
            ask()
            is_asking.clear()
    finally:
        threading.setprofile(None)
    hold("POST /v1/classify", calls, REQUEST)
