"""What comes from elsewhere runs nothing, fetches nothing, fills nothing up and reaches nothing but what it is."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dvora.recipes.training.checkpoints import checkpoints, mark_complete
from tests.hardening.forks import TRAIN, Forks, assert_error
from tests.hardening.strangers import (
    CASES,
    MARK,
    MEMORY,
    SOON,
    THEIRS,
    Evil,
    of_adapter,
    of_run,
    pickled,
    settings,
    with_code,
)

RUN = "train --task text-classification -m base --data reviews.csv -o run --rank 4 --cpu --epochs 1 --quiet"
PREDICT, MERGE = "predict run reviews.csv -o new.csv", "merge adapter -o out"
QUICK = 18
"""Changes of single bytes of a record in the normal suite."""


@pytest.fixture(scope="module")
def with_run(forks: Forks, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk with a run, and with a folder that no command has to do with."""
    desk = Path(shutil.copytree(made, tmp_path_factory.mktemp("with-run") / "desk"))
    ended = forks.run(desk, *RUN.split())
    assert (ended.code, ended.asked) == (0, 0), ended
    (desk / THEIRS).mkdir()
    (desk / THEIRS / "letter").write_text("dear")
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
def test_hostile_input_is_refused_soon_in_little_memory_and_reaches_nothing(
    forks: Forks, desk: Path, name: str
) -> None:
    change, command, message = CASES[name]
    change(desk)
    ended = forks.run(desk, *command.split(), signal_after=SOON, memory=MEMORY)
    assert ended.code in (1, 2), ended
    assert_error(ended, ended.code, message)
    assert len(ended.stderr) < 3000
    assert ended.asked == 0
    assert not (desk / MARK).exists()
    assert [(path.name, path.read_text()) for path in (desk / THEIRS).iterdir()] == [("letter", "dear")]
    assert not (desk / "new.csv").exists()
    assert (desk / "out").is_symlink() or not [*(desk / "out").glob("[!.]*")]


def test_the_code_and_the_pickles_of_the_cases_are_evil(forks: Forks, desk: Path) -> None:
    with_code(desk)
    forks.run(desk, *PREDICT.split(), "--trust-remote-code")
    assert (desk / MARK).exists()
    (desk / MARK).unlink()
    pickled("evil.bin", "reviews.csv")(desk)
    torch.load(desk / "evil.bin", weights_only=False)["weight"].close()
    assert (desk / MARK).exists()


@pytest.mark.parametrize("command", [f"{PREDICT} --download", f"{MERGE} --model nobody/nothing"])
def test_what_a_user_asks_for_is_fetched(forks: Forks, desk: Path, command: str) -> None:
    of_run(model="nobody/nothing")(desk)
    ended = forks.run(desk, *command.split())
    assert_error(ended, ended.code, "the hub cannot be reached")
    assert ended.asked > 0


def test_what_is_in_the_hub_s_cache_is_taken_from_there(forks: Forks, desk: Path) -> None:
    repository = forks.folder / "hub" / "models--nobody--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(desk / "base", repository / "snapshots" / ("0" * 40))
    of_run(model="nobody/cached")(desk)
    of_adapter(base_model_name_or_path="nobody/cached")(desk)
    for command in (PREDICT, MERGE):
        ended = forks.run(desk, *command.split())
        assert (ended.code, ended.asked) == (0, 0), ended
    assert (desk / "out" / "tokenizer.json").exists()


def test_no_run_starts_through_a_link_that_nobody_typed(forks: Forks, desk: Path) -> None:
    (desk / THEIRS / "letter").unlink()
    (desk / "dvora-run").symlink_to(desk / THEIRS)
    command = [*TRAIN.replace("-o out ", "").split(), "--quiet"]
    assert_error(forks.run(desk, *command), 2, "dvora-run is a link; name the folder")
    assert not [*(desk / THEIRS).iterdir()]
    ended = forks.run(desk, *command, "-o", "dvora-run")
    assert ended.code == 0, ended.stderr
    assert (desk / THEIRS / "run.json").exists()


def test_a_changed_record_is_refused_or_obeyed_where_it_may_be(
    forks: Forks, desk: Path, request: pytest.FixtureRequest
) -> None:
    """Bytes of the small files that describe a run or an adapter, changed at random."""
    drawn = random.Random(20261126)
    count = 90 * QUICK if request.config.getoption("--fuzz") else QUICK
    files = {
        "run/run.json": "predict run lines.txt -o new.csv",
        "adapter/adapter_config.json": MERGE,
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


# Pickles that lie beside what is read are not looked at, and those in a checkpoint run nothing.


def test_a_pickle_beside_safetensors_is_not_looked_at(forks: Forks, desk: Path) -> None:
    for path in ("adapter/adapter_model.bin", "base/pytorch_model.bin", "base/training_args.bin"):
        torch.save({"weight": Evil(desk / MARK)}, desk / path)
    for command in (TRAIN, "merge adapter --model base -o merged", "merge out -o merged-run", "count base"):
        assert forks.run(desk, *command.split()).code == 0
    assert not (desk / MARK).exists()
    assert not [*(desk / "merged").glob("*.bin"), *(desk / "merged-run").glob("*.bin")]


@pytest.fixture(scope="module")
def killed(forks: Forks, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk with a run that was killed after its second checkpoint."""
    desk = Path(shutil.copytree(made, tmp_path_factory.mktemp("killed") / "desk"))
    assert forks.run(desk, *TRAIN.split(), "--epochs", "3", "--quiet", kill_at=55).code == -signal.SIGKILL
    return desk


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.bin"])
def test_an_evil_checkpoint_runs_nothing(forks: Forks, desk: Path, killed: Path, name: str) -> None:
    """transformers keeps an optimizer's state in torch's format; it is read as tensors and nothing else."""
    # Its settings name the folders where it was killed.
    shutil.copytree(killed, desk, dirs_exist_ok=True)
    checkpoint = checkpoints(desk / "out" / "checkpoints")[-1]
    torch.save({"weight": Evil(desk / MARK)}, checkpoint / name)
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    # As if whoever put it there knew of the mark.
    mark_complete(checkpoint)
    assert_error(forks.run(desk, "train", "out", "-o", "out", "--quiet", "--resume"), 2, "checkpoint", "remove")
    assert not (desk / MARK).exists()
