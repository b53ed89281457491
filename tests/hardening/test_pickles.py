"""What could run code when it is loaded is not loaded: pickled weights, pickled checkpoints, models with code."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from dvora.recipes.training.checkpoints import checkpoints, mark_complete
from tests.hardening.errors import TRAIN, assert_error, assert_fails
from tests.hardening.forks import Forks


class Evil:
    """Makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What evil pickles make."""
    return tmp_path / "made-by-a-pickle"


def write_evil(path: Path, mark: Path) -> None:
    torch.save({"weight": Evil(mark)}, path)


def test_the_pickles_are_evil(tmp_path: Path, mark: Path) -> None:
    write_evil(tmp_path / "evil.bin", mark)
    torch.load(tmp_path / "evil.bin", weights_only=False)["weight"].close()
    assert mark.exists()


@pytest.mark.parametrize("command", ["inspect adapter", "merge adapter -o out", "convert adapter --to dora -o out"])
def test_a_pickled_adapter_is_refused(forks: Forks, desk: Path, mark: Path, command: str) -> None:
    (desk / "adapter" / "adapter_model.safetensors").unlink()
    write_evil(desk / "adapter" / "adapter_model.bin", mark)
    assert_fails(forks, desk, command.split(), 1, "pickled adapter_model.bin", "never loaded", "save_pretrained")
    assert not mark.exists()


@pytest.mark.parametrize(("command", "code"), [(TRAIN, 2), ("merge adapter --model base -o out", 1)])
def test_a_pickled_model_is_refused(forks: Forks, desk: Path, mark: Path, command: str, code: int) -> None:
    (desk / "base" / "model.safetensors").unlink()
    write_evil(desk / "base" / "pytorch_model.bin", mark)
    assert_fails(forks, desk, command.split(), code, "no safetensors weights", "never loaded", "save_pretrained")
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_looked_at(forks: Forks, desk: Path, mark: Path) -> None:
    for path in ("adapter/adapter_model.bin", "base/pytorch_model.bin", "base/training_args.bin"):
        write_evil(desk / path, mark)
    for command in (TRAIN, "merge adapter --model base -o merged", "merge out -o merged-run", "count base"):
        assert forks.run(desk, *command.split()).code == 0
    assert not mark.exists()
    assert not [*(desk / "merged").glob("*.bin"), *(desk / "merged-run").glob("*.bin")]


LONG = [*TRAIN.split(), "--epochs", "3", "--quiet"]


@pytest.fixture(scope="module")
def killed(forks: Forks, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk with a run that was killed after its second checkpoint."""
    desk = Path(shutil.copytree(made, tmp_path_factory.mktemp("killed") / "desk"))
    assert forks.run(desk, *LONG, kill_at=55).code == -signal.SIGKILL
    return desk


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.bin"])
def test_an_evil_checkpoint_runs_nothing(forks: Forks, desk: Path, killed: Path, mark: Path, name: str) -> None:
    """transformers keeps an optimizer's state in torch's format; it is read as tensors and nothing else."""
    # Its settings name the folders where it was killed.
    shutil.copytree(killed, desk, dirs_exist_ok=True)
    command = ["train", "out", "-o", "out", "--quiet"]
    checkpoint = checkpoints(desk / "out" / "checkpoints")[-1]
    write_evil(checkpoint / name, mark)
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    # As if whoever put it there knew of the mark.
    mark_complete(checkpoint)
    assert_error(forks.run(desk, *command, "--resume"), 1, "checkpoint", "remove")
    assert not mark.exists()
