"""What comes from elsewhere runs nothing, fetches nothing, fills nothing up and reaches nothing but what it is."""

import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.hardening.errors import TRAIN, assert_error
from tests.hardening.forks import ROOT, Forks
from tests.hardening.strangers import CASES, MEMORY, SOON, of_adapter, of_run, settings

RUN = "train --task text-classification -m base --data reviews.csv -o run --rank 4 --cpu --epochs 1 --quiet"

OF_RUNS = ("predict run reviews.csv -o new.csv", "evaluate run", "report run", "doctor run")

OF_ADAPTERS = ("merge adapter -o out", "convert adapter --to dora -o out", "analyze adapter", "doctor adapter")

QUICK = 18

"""Changes of single bytes of a record in the normal suite."""


@pytest.fixture(scope="module")
def with_run(forks: Forks, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk with a run."""
    desk = Path(shutil.copytree(made, tmp_path_factory.mktemp("with-run") / "desk"))
    ended = forks.run(desk, *RUN.split())
    assert (ended.code, ended.asked) == (0, 0), ended
    return desk


@pytest.fixture
def desk(with_run: Path, tmp_path: Path) -> Path:
    """A copy of it, whose run and adapter name what is there."""
    desk = Path(shutil.copytree(with_run, tmp_path / "desk"))
    for path in (desk / "run" / "run.json", desk / "run" / "config.yaml", *desk.rglob("adapter_config.json")):
        path.write_text(path.read_text().replace(str(with_run), str(desk)))
    settings(desk / "adapter" / "adapter_config.json", base_model_name_or_path=str(desk / "base"))
    return desk


@pytest.mark.parametrize("name", CASES)
def test_hostile_input_is_reported_soon_and_in_little_memory(forks: Forks, desk: Path, name: str) -> None:
    change, command, message = CASES[name]
    change(desk)
    ended = forks.run(desk, *command.split(), signal_after=SOON, memory=MEMORY)
    assert ended.code in (1, 2), ended
    assert_error(ended, ended.code, message)
    assert len(ended.stderr) < 3000
    assert ended.asked == 0
    assert not {"out", "new.csv"} & {path.name for path in desk.iterdir() if any(path.glob("[!.]*"))}


def with_code(desk: Path, mark: Path) -> None:
    """A base with code of its own, which makes a file when it is run."""
    path = desk / "base" / "config.json"
    kinds = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model", "AutoModel": "evil.Model"}
    settings(path, model_type="evil", auto_map=kinds)
    (desk / "base" / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import BertConfig as Config\n"
        "from transformers import BertForSequenceClassification as Model\n"
    )


@pytest.mark.parametrize(("command", "code"), [(OF_RUNS[0], 2), (TRAIN, 2), (f"{OF_ADAPTERS[0]} --model base", 1)])
def test_no_code_is_run_that_nobody_asked_for(
    forks: Forks, desk: Path, tmp_path: Path, command: str, code: int
) -> None:
    mark = tmp_path / "made-by-code"
    with_code(desk, mark)
    of_run(trust_remote_code=True)(desk)
    assert_error(forks.run(desk, *command.split()), code, "trust-remote-code" if code == 2 else "which is not run")
    assert not mark.exists()
    if command == OF_RUNS[0]:
        forks.run(desk, *command.split(), "--trust-remote-code")
        assert mark.exists()


@pytest.mark.parametrize(("command", "setting"), [(OF_RUNS[0], "model"), (OF_RUNS[1], "tokenizer")])
def test_a_run_cannot_have_anything_fetched(forks: Forks, desk: Path, command: str, setting: str) -> None:
    of_run(**{setting: "nobody/nothing"})(desk)
    ended = forks.run(desk, *command.split())
    assert_error(ended, 2, "'nobody/nothing' is no folder here and not in the hub's cache", "give --download")
    assert ended.asked == 0
    if command == OF_RUNS[0]:
        ended = forks.run(desk, *command.split(), "--download")
        assert_error(ended, 2, "the hub cannot be reached")
        assert ended.asked > 0


@pytest.mark.parametrize("command", [OF_ADAPTERS[0], OF_ADAPTERS[3], "generate --adapter adapter x"])
def test_an_adapter_cannot_have_anything_fetched(forks: Forks, desk: Path, command: str) -> None:
    of_adapter(base_model_name_or_path="nobody/nothing")(desk)
    ended = forks.run(desk, *command.split())
    assert_error(ended, ended.code, "'nobody/nothing' is no folder here and not in the hub's cache")
    assert ended.asked == 0
    # Its user may name it.
    ended = forks.run(desk, *command.split(), "--model", "nobody/nothing")
    assert_error(ended, ended.code, "the hub cannot be reached")
    assert ended.asked > 0


def test_what_is_in_the_hub_s_cache_is_taken_from_there(forks: Forks, desk: Path) -> None:
    repository = forks.folder / "hub" / "models--nobody--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(desk / "base", repository / "snapshots" / ("0" * 40))
    of_run(model="nobody/cached")(desk)
    of_adapter(base_model_name_or_path="nobody/cached")(desk)
    for command in (OF_RUNS[0], OF_ADAPTERS[0]):
        ended = forks.run(desk, *command.split())
        assert (ended.code, ended.asked) == (0, 0), ended
    assert (desk / "out" / "tokenizer.json").exists()


@pytest.fixture
def theirs(desk: Path) -> Path:
    """A folder that no command has to do with."""
    folder = desk / "theirs"
    folder.mkdir()
    (folder / "letter").write_text("dear")
    return folder


def untouched(folder: Path) -> bool:
    return [(path.name, path.read_text()) for path in folder.iterdir()] == [("letter", "dear")]


@pytest.mark.parametrize(
    ("name", "to", "state"),
    [
        ("run/checkpoints", "theirs", "finished"),
        ("run/adapter", "theirs", "started"),
        ("run/.adapter.unfinished", "theirs", "finished"),
        ("run/.run.json.x", "theirs", "started"),
        ("run/tensorboard", "theirs", "finished"),
        ("run/.lock", "theirs/letter", "started"),
        ("run/config.yaml", "theirs/letter", "finished"),
    ],
)
def test_no_run_goes_on_through_a_link(forks: Forks, desk: Path, theirs: Path, name: str, to: str, state: str) -> None:
    settings(desk / "run" / "run.json", state=state)
    shutil.copy(desk / "run" / "config.yaml", desk / "a.yaml")
    if (desk / name).is_dir():
        shutil.rmtree(desk / name)
    else:
        (desk / name).unlink(missing_ok=True)
    (desk / name).symlink_to(desk / to)
    assert_error(forks.run(desk, "train", "a.yaml", "--resume", "--quiet"), 2, f"{name} is a link")
    assert untouched(theirs)


def test_no_run_starts_through_a_link_that_nobody_typed(forks: Forks, desk: Path, theirs: Path) -> None:
    (theirs / "letter").unlink()
    (desk / "dvora-run").symlink_to(theirs)
    command = [*TRAIN.replace("-o out ", "").split(), "--quiet"]
    assert_error(forks.run(desk, *command), 2, "dvora-run is a link; name the folder")
    assert not [*theirs.iterdir()]
    ended = forks.run(desk, *command, "-o", "dvora-run")
    assert ended.code == 0, ended.stderr
    assert (theirs / "run.json").exists()


@pytest.mark.parametrize("folder", ["adapter", "base"])
def test_no_secret_is_copied_beside_a_merged_model(forks: Forks, desk: Path, theirs: Path, folder: str) -> None:
    (desk / folder / "tokenizer_extra.json").symlink_to(theirs / "letter")
    assert_error(forks.run(desk, *OF_ADAPTERS[0].split()), 1, "tokenizer_extra.json is a link out of its folder")
    assert not (desk / "out").exists()


def test_a_changed_record_is_refused_or_obeyed_where_it_may_be(
    forks: Forks, desk: Path, request: pytest.FixtureRequest
) -> None:
    """Bytes of the small files that describe a run or an adapter, changed at random."""
    drawn = random.Random(20261126)
    count = 90 * QUICK if request.config.getoption("--fuzz") else QUICK
    files = {
        "run/run.json": "predict run lines.txt -o new.csv",
        "adapter/adapter_config.json": "merge adapter -o out",
        "run/config.yaml": "train run --resume",
    }
    (desk / "lines.txt").write_text("good\n")
    for number in range(count):
        name, command = [*files.items()][number % len(files)]
        content = (desk / name).read_bytes()
        changed = bytearray(content)
        for _ in range(drawn.randint(1, 3)):
            place = drawn.randrange(len(changed))
            changed[place : place + drawn.randint(0, 2)] = bytes([drawn.choice(b'"[]{}:,-0129eE\\\xff\x1b anulltrue')])
        (desk / name).write_bytes(changed)
        ended = forks.run(desk, *command.split(), signal_after=SOON, memory=MEMORY)
        (desk / name).write_bytes(content)
        assert ended.code in (0, 1, 2), (bytes(changed), ended)
        assert ended.asked == 0
        assert "Traceback" not in ended.stderr
        assert "\x1b" not in ended.stderr
        shutil.rmtree(desk / "out", ignore_errors=True)
    assert not os.path.lexists(desk / ".out.unfinished")


def test_the_page_on_strangers_files_names_flags_that_there_are(forks: Forks, desk: Path) -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    flags = {*re.findall(r"`[^`\n]*?(--[\w-]+)[^`\n]*`", page)}
    commands = ("train", "predict", "merge")
    helped = "".join(forks.run(desk, command, "--help").stdout for command in commands)
    assert flags - {flag for flag in flags if flag in helped} == {"--version"}
