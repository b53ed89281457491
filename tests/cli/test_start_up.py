"""What a command imports before it does anything: nothing large without need, however fast the machine is."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.finished_runs import finished

SOURCE = Path(__file__).parent.parent.parent / "src"
HELP = (
    *("dvora --help", "dvora --version", "dvora train --help", "dvora train --print-config"),
    "dvora serve --new-key acme",
)
MISTAKES = (
    *(f"dvora {name} nowhere" for name in ("inspect", "doctor", "analyze", "report")),
    *("dvora merge nowhere -o new", "dvora merge . -o new --dtype int4"),
    *("dvora convert nowhere --to dora -o new", "dvora convert . --to peft-dora -o new"),
)
START = (
    *("dvora inspect EMPTY", "dvora count EMPTY", "dvora merge EMPTY --output OUT", "dvora analyze EMPTY"),
    *("dvora convert EMPTY --to dora --output OUT", "dvora doctor EMPTY"),
    *("dvora report RUN", "dvora evaluate RUN", "dvora generate RUN text", "dvora predict RUN rows.csv"),
    "dvora train --task text-classification --model EMPTY --data rows.csv",
)
LARGE = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "matplotlib"),
    *("torchao", "bitsandbytes", "hqq", "deepspeed", "scipy", "sklearn"),
)
# PEFT and transformers import the last four where they are installed, which no command that uses PEFT can prevent.
FOR_PEFT = {"torch", "transformers", "peft", "accelerate", "torchao", "bitsandbytes", "hqq", "scipy"}
FOR_DATA = FOR_PEFT | {"datasets", "pandas", "pyarrow"}
FOR_PAGES = FOR_DATA | {"matplotlib"}
ALLOWED = {
    **dict.fromkeys(("inspect", "count", "merge", "analyze", "convert"), FOR_PEFT),
    **dict.fromkeys(("doctor", "evaluate", "predict", "generate", "train"), FOR_DATA),
    "report": FOR_PAGES,
}
PROGRAM = """
import contextlib, io, json, sys
commands, large = json.loads(sys.argv[1])
for command in commands:
    if command.startswith("dvora "):
        sys.argv = command.split()
        from dvora.cli.app import main
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(SystemExit):
                main()
    else:
        exec("import dvora; " + command)
    print(json.dumps([name for name in large if name in sys.modules]))
"""


def prepare(folder: Path) -> None:
    """Make what the commands name: all that is found without large packages is right, the model is not there."""
    (folder / "EMPTY").mkdir()
    (folder / "RUN").mkdir()
    (folder / "rows.csv").write_text("text,label\ngood,yes\n")
    settings = {"task": "text-classification", "model": str(folder / "EMPTY"), "data": [str(folder / "rows.csv")]}
    record = {"state": "finished", "settings": settings, "labels": ["no", "yes"], "data": {"files": {}}, "metrics": {}}
    (folder / "RUN" / "run.json").write_text(json.dumps(record))


def imported_after(folder: Path, *commands: str) -> dict[str, set[str]]:
    """The large packages that are there after each command, when a new process runs one after the other.

    Each shows what it imports if those before it may import no more than it may.
    """
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([commands, LARGE])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(zip(commands, map(set, map(json.loads, ended.stdout.splitlines())), strict=True))


def test_what_loads_no_model_imports_nothing_large(tmp_path: Path) -> None:
    helps = (f"dvora {name} --help" for name in ("inspect", "count", "merge", "convert"))
    found = imported_after(tmp_path, "import dvora", *HELP, *helps, *MISTAKES, "dvora.DVoRAAdapter")
    assert found.pop("dvora.DVoRAAdapter") == {"torch"}
    assert not {command: names for command, names in found.items() if names}


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_mistakes_in_data_and_names_are_found_before_libraries_of_models_load(
    tmp_path: Path, listening: socket.socket
) -> None:
    prepare(tmp_path)
    (tmp_path / "bad.csv").write_text("text,label\ngood,\n")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    train, (_, taken) = "dvora train --task text-classification", listening.getsockname()
    commands = {
        f"{train} --model EMPTY --data rows.csv": "EMPTY holds no config.json, so it is no model folder",
        f"{train} --model smal --data rows.csv": "'smal' is no folder here (did you mean 'small'?)",
        f"{train} --model small --data missing.csv": "missing.csv: no such file or folder",
        f"{train} --model small --data bad.csv": "bad.csv, row 1: column 'label' is empty",
        "dvora serve smal --adapters EMPTY": "'smal' is no folder here (did you mean 'small'?)",
        "dvora serve small --adapters EMPTY --keys bad.csv": "--keys bad.csv: ",
        f"dvora serve small --adapters EMPTY --port {taken}": f"--port {taken} of 127.0.0.1 is in use",
        "dvora predict RUN rows.csv": "EMPTY holds no config.json, so it is no model folder",
    }
    found = imported_after(tmp_path, *commands)
    assert not {command: names for command, names in found.items() if names - {"pyarrow"}}
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    for command, message in commands.items():
        program = [sys.executable, "-m", "dvora.cli", *command.split()[1:]]
        ended = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert message in ended.stderr


def test_no_line_of_another_package_is_before_the_results(tmp_path: Path) -> None:
    run = finished("text-classification", tmp_path)
    (tmp_path / "new.csv").write_text("text\ngood movie\n")
    program = [sys.executable, "-m", "dvora.cli", "predict", str(run.folder), str(tmp_path / "new.csv")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["text"] == "good movie"


def test_a_command_imports_what_it_uses(tmp_path: Path) -> None:
    prepare(tmp_path)
    allowed = {command: ALLOWED[command.split()[1]] for command in START}
    found = imported_after(tmp_path, *sorted(allowed, key=lambda command: len(allowed[command])))
    assert not {command: names - allowed[command] for command, names in found.items() if names - allowed[command]}
    assert all("torch" in names for names in found.values())
