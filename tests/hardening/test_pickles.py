"""Pickles that lie beside what is read are not looked at, and those in a checkpoint run nothing."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from dvora.recipes.training.checkpoints import checkpoints, mark_complete
from tests.hardening.errors import TRAIN, assert_error
from tests.hardening.forks import Forks
from tests.hardening.strangers import MARK, Evil


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
    assert_error(forks.run(desk, "train", "out", "-o", "out", "--quiet", "--resume"), 1, "checkpoint", "remove")
    assert not (desk / MARK).exists()
