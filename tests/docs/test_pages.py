"""The documentation: its code runs, what it types is what is recorded, its links lead somewhere, its site is built."""

import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

import dvora
from tests.fresh import FRESH
from tests.recipes import tiny_models
from tests.tools.pages.seen import PHONE, WIDE, seen
from transcript.__main__ import BLOCK, PAGES, SHELL, commands, recorded

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
FILES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
FENCES = re.compile(r"^```(\w*)$", flags=re.MULTILINE)
# transformers deprecates a property that PEFT asks for, torch 2.13 an argument that has no other name in torch 2.12.
DEPRECATED = ["`is_gradient_checkpointing` is deprecated", "`broadcast_buffers` is deprecated"]


def name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small models under the names that pages use, and an adapter where the commands leave theirs."""
    tiny_models.bert(tmp_path / "minilm")
    tiny_models.llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained("minilm", num_labels=2)
    config = dvora.DVoRAConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained("runs/reviews/adapter")
    return tmp_path


def run_code(path: Path, folder: Path) -> None:
    """Run all code of a page in a folder, where a warning is an error."""
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for known in DEPRECATED:
        warnings.filterwarnings("ignore", known, FutureWarning)
    names: dict[str, object] = {"__name__": "page"}
    for code in CODE.findall(path.read_text(encoding="utf-8")):
        exec(compile(code, str(path), "exec"), names)


@pytest.mark.filterwarnings(f"ignore:{DEPRECATED[0]}:FutureWarning")
@pytest.mark.parametrize("path", [path for path in FILES if CODE.search(path.read_text(encoding="utf-8"))], ids=name)
def test_all_code_of_a_page_runs_from_top_to_bottom(path: Path, desk: Path) -> None:
    # In a process of its own, as a reader's: `fully_shard` changes what the whole process takes for granted.
    with ProcessPoolExecutor(1, mp_context=FRESH) as process:
        process.submit(run_code, path, desk).result()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_block_is_run_or_says_why_not(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    opened = FENCES.findall(text)[::2]
    assert {*opened} <= {"python", "console", "sh"}
    assert ("console" in opened) == (name(path) in PAGES)
    assert opened.count("sh") == len(re.findall(r"^<!-- not run: .+ -->\n```sh$", text, flags=re.MULTILINE))
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


def test_the_notebook_runs() -> None:
    command = [sys.executable, "-m", "transcript.notebook"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = re.search(r"merged: (0\.\d+)", ended.stdout)
    assert told is not None
    assert float(told[1]) > 0.8


def test_every_page_is_in_the_navigation() -> None:
    # Its tags name Python functions, which a safe loader does not know.
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert sorted(pages) == [name(path) for path in FILES]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of its making is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (built.returncode, built.stderr) == (0, "")
    return folder


def test_the_reference_comes_from_the_docstrings(site: Path) -> None:
    text = (site / "reference.html").read_text(encoding="utf-8")
    for told in ("parameter_groups", "DVoRAConfig", "examine", "dvora_linear"):
        assert told in text


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
@pytest.mark.parametrize("page", ["index", "get-started", "how-it-works", "results", "reference", "notebook"])
def test_the_site_reads_well_in_a_browser(site: Path, page: str, width: int, scheme: str) -> None:
    with seen(site / f"{page}.html", width, scheme, root=site) as found:
        assert found.width() == width
        assert found.page.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
        paper = sum(found.colour("body", "backgroundColor"))
        assert (paper > 600) == (scheme == "light")
        assert found.complaints == []
