"""Every example of every help text: it runs as it is typed, on one desk that has what the examples name."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dvora.cli.app import app
from dvora.whole_files import remove
from tests.cli.program import run
from tests.recipes import tiny_data, tiny_models
from tests.recipes.saved_adapters import save

USE_A_RUN = ("evaluate", "predict", "generate", "doctor", "analyze", "report")
USE_AN_ADAPTER = ("inspect", "count", "merge", "convert", "bank pack", "bank unpack", "bank inspect")
WITH_JSON = ("count base", "merge adapter --output merged", "bank unpack adapters.dvora --output unpacked")


def examples(command: str) -> list[str]:
    """The lines of a help text that can be typed."""
    text = run(f"dvora {command} --help").stdout
    lines = [line.strip().removeprefix("Example: ") for line in text.splitlines()]
    return [line for line in lines if f"dvora {command} " in line and line.startswith(("dvora", "echo", "cat"))]


def typed(line: str) -> Any:
    """What a command line ends with, of which a pipe and a redirection are understood."""
    before, _, words = line.rpartition(" | ")
    words, _, target = words.partition(" > ")
    stdin = subprocess.run(shlex.split(before), capture_output=True, check=True).stdout if before else None
    result = CliRunner().invoke(app, shlex.split(words)[1:], input=stdin)
    assert result.exit_code == 0, (line, result.output, result.exception)
    assert result.stdout.strip(), line
    if target:
        Path(target).write_text(result.stdout)
    return result


@pytest.fixture(autouse=True, scope="module")
def wide() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, wide: None) -> Path:
    """A folder with the models, data and adapters that the examples name, with a space and an umlaut in its name."""
    folder = tmp_path_factory.mktemp("my dësk")
    base = tiny_models.bert(folder / "base")
    shutil.copytree(base, folder / "minilm")
    tiny_models.llama(folder / "smollm2")
    tiny_data.play(folder / "play.txt")
    text, *rows = tiny_data.reviews(folder / "reviews.csv").read_text().splitlines()
    (folder / "new.csv").write_text("\n".join([f"{text},verdict", *(f"{row},{row.split(',')[1]}" for row in rows)]))
    (folder / "lines.txt").write_text("good a movie\n\nbad the book\n")
    (folder / "prompts.txt").write_text("the movie\nthe book\n")
    for name, method in (("adapter", "dvora"), ("other-adapter", "dvora"), ("vera-adapter", "vera")):
        save(base, folder / name, method)
    for copy in ("trainer-output/checkpoint-5", "trainer-output/checkpoint-10", "adapters/one", "adapters/two"):
        shutil.copytree(folder / "adapter", folder / copy)
    return folder


@pytest.fixture
def at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves on the desk what was there."""
    monkeypatch.chdir(desk)
    before = {*desk.iterdir()}
    yield
    for path in {*desk.iterdir()} - before:
        remove(path)


@pytest.fixture(scope="module")
def trained(desk: Path) -> Path:
    """The desk with the runs that the examples of `dvora train` make, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        lines = examples("train")
        assert len(lines) >= 5
        for line in lines:
            typed(line)
        typed("dvora train dvora-run/config.yaml --method head -o head-run")
    return desk


def run_examples(command: str) -> None:
    results = {line: typed(line) for line in examples(command)}
    assert all(isinstance(json.loads(result.stdout), dict) for line, result in results.items() if "--json" in line)
    # On a terminal `dvora generate` names the next command too.
    assert command == "generate" or "Next: " in next(iter(results.values())).stderr


@pytest.mark.parametrize("command", USE_AN_ADAPTER)
def test_examples_with_adapters(command: str, at_the_desk: None) -> None:
    if command in ("bank unpack", "bank inspect"):
        typed("dvora bank pack adapters --output adapters.dvora")
    run_examples(command)


def test_examples_of_training(trained: Path) -> None:
    assert {path.name for path in (trained / "runs").iterdir()} == {"play", "lora", "decay"}
    assert (trained / "dvora-run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("command", USE_A_RUN)
def test_examples_with_runs(command: str, trained: Path, at_the_desk: None) -> None:
    run_examples(command)


@pytest.mark.parametrize("line", WITH_JSON)
def test_quiet_says_nothing_on_stderr_and_json_is_one_object(line: str, at_the_desk: None) -> None:
    if "bank" in line:
        typed("dvora bank pack adapters --output adapters.dvora")
    result = typed(f"dvora {line} --quiet --json")
    assert result.stderr == ""
    assert isinstance(json.loads(result.stdout), dict)
    assert result.stdout.count("\n") == 1
