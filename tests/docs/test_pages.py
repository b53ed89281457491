"""The documentation's pages: their code runs, their commands are recorded, the reference has every public name."""

import csv
import json
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

import dvora
from tests.recipes import tiny_models
from transcript.__main__ import BLOCK, PAGES, SHELL, commands, recorded
from transcript.forks import FORKS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
FILES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
WITH_SERVERS = {"how-to/export.md", "how-to/hub.md", "how-to/ray-serve.md", "how-to/serve.md"}
"""Pages whose commands need other programs or an order; each has a test of its own that runs them."""
FENCES = re.compile(r"^```(\w*)$", flags=re.MULTILINE)
# transformers deprecates a property that PEFT asks for, torch 2.13 an argument that has no other name in torch 2.12.
DEPRECATED = ["`is_gradient_checkpointing` is deprecated", "`broadcast_buffers` is deprecated"]


def name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small models and data under the names that pages use, and an adapter as commands leave it."""
    tiny_models.bert(tmp_path / "minilm")
    tiny_models.llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    with Path("reviews.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"a {word} movie", label] for label in ("good", "bad") for word in tiny_models.WORDS)
    base = AutoModelForSequenceClassification.from_pretrained("minilm", num_labels=2)
    config = dvora.DVoRAConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained("runs/reviews/adapter")
    return tmp_path


def run_code(blocks: Sequence[str], folder: Path) -> str:
    """Run all code of a page in a folder, where a warning is an error; what it prints."""
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for known in DEPRECATED:
        warnings.filterwarnings("ignore", known, FutureWarning)
    names: dict[str, object] = {"__name__": "page"}
    with redirect_stdout(StringIO()) as printed:
        for block in blocks:
            exec(block, names)
    return printed.getvalue()


@pytest.mark.filterwarnings(f"ignore:{DEPRECATED[0]}:FutureWarning")
@pytest.mark.parametrize(
    "path",
    [path for path in FILES if CODE.search(path.read_text(encoding="utf-8")) and name(path) not in WITH_SERVERS],
    ids=name,
)
def test_all_code_of_a_page_runs_from_top_to_bottom(path: Path, desk: Path) -> None:
    # In a process of its own, as a reader's: `fully_shard` changes what the whole process takes for granted.
    with ProcessPoolExecutor(1, mp_context=FORKS) as process:
        process.submit(run_code, CODE.findall(path.read_text(encoding="utf-8")), desk).result()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_block_is_run_or_says_why_not(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    opened = FENCES.findall(text)[::2]
    # The file of keys is read by tests/serve/test_how_to.py, and JavaScript by tests/export/test_web.py.
    assert {*opened} <= {"python", "console", "sh", "csv", "html", "js", "toml"}
    assert ("console" in opened) == (name(path) in PAGES)
    assert name(path) in WITH_SERVERS or opened.count("sh") == len(
        re.findall(r"^<!-- not run: .+ -->\n```sh$", text, flags=re.MULTILINE)
    )
    assert not re.search(r"^    (pip|python|dvora|make) ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_ours_and_have_shown_something(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert {command.split()[0] for command in commands(page=text)} <= {"dvora", *SHELL}
    assert all(match[2].strip() for match in BLOCK.finditer(text)), "python -m transcript --record"
    assert len(commands(text)) == text.count("```console")


def test_what_is_shown_goes_into_its_own_block() -> None:
    page = "a\n```console\n$ dvora x\nold\n```\nb\n```console\n$ dvora y\n```\n"
    assert commands(page) == ["dvora x", "dvora y"]
    assert recorded(page, ["1\n2", "3"]) == ("a\n```console\n$ dvora x\n1\n2\n```\nb\n```console\n$ dvora y\n3\n```\n")


def test_get_started_leads_from_a_table_to_a_merged_model() -> None:
    typed = commands((DOCS / "get-started.md").read_text(encoding="utf-8"))
    order = ["train", "predict", "doctor", "report", "analyze", "merge"]
    assert [command.split()[1] for command in typed if command.split()[1] in order] == order


@pytest.mark.parametrize("first", ["README.md", "docs/index.md"])
def test_the_result_on_the_first_screens_is_the_recorded_one(first: str) -> None:
    page = (DOCS / "get-started.md").read_text(encoding="utf-8")
    shown = page.partition("text,prediction,probability\n")[2].partition("\n```")[0]
    rows = [(text, predicted) for text, predicted, _ in csv.reader(shown.splitlines())]
    text = (ROOT / first).read_text(encoding="utf-8")
    table = text.partition("| text | prediction |\n|---|---|\n")[2].partition("\n\n")[0]
    assert rows
    assert [tuple(line.strip("| ").split(" | ")) for line in table.splitlines()] == rows


def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    with ProcessPoolExecutor(1, mp_context=FORKS) as process:
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        printed = process.submit(run_code, code, tmp_path).result()
    accuracy = re.search(r"merged: (0\.\d+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.8


def test_every_public_name_is_in_the_reference_once() -> None:
    # `dvora.flat` and `dvora.functional` are modules, of which the others are members.
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: dvora\.(\w+)$", text, flags=re.MULTILINE)) == sorted(
        {*dvora.__all__, "doctor", "analysis"}
    )


def test_every_picture_has_a_dark_variant_and_is_shown() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    shown = set(re.findall(r"pictures/(\w+)\.(svg|webp)\)", texts))
    drawn = {path.name for path in (DOCS / "pictures").iterdir()}
    assert drawn == {f"{name}{ending}.{kind}" for name, kind in shown for ending in ("", "-dark")}


def test_pictures_are_readable_at_the_width_of_a_page() -> None:
    for path in (DOCS / "pictures").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        width = re.search(r'<svg [^>]*width="([\d.]+)pt"', text)
        assert width is not None, path
        assert float(width[1]) <= 7 * 72, path
        assert min(map(float, re.findall(r"font-size: ([\d.]+)px", text))) >= 6, path


def test_every_page_is_in_the_navigation() -> None:
    # Its tags name Python functions, which a safe loader does not know.
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert sorted(pages) == [name(path) for path in FILES]
