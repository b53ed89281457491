"""Lightning: an adapted model inside a LightningModule, checkpoints of what is trained alone, and a run that goes on.

A small convolutional network knows handwritten digits; adapters teach it to read them lying on their side.
"""

import copy
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dvora
from dvora.training import parameter_groups
from examples.checks import folder_bytes, frozen_digest, report, require, same_bits, trained_parameters
from materials.data import digits
from materials.splits import Images

EPOCHS, SAVED_AFTER = 12, 6


class Digits(lightning.LightningModule):
    """Any classifier of images. The lines that matter: each vector in a group of its own, and small checkpoints."""

    strict_loading = False  # a checkpoint is loaded into a module whose base is there already

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.model, self.learning_rate))  # no decay of magnitudes

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n in trained}


def network() -> nn.Module:
    """For one grey image of 8 x 8."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=4)
    return nn.Sequential(convolutions[0], nn.GELU(), convolutions[1], nn.GELU(), nn.Flatten(), nn.Linear(1024, 10))


def adapted(base: nn.Module) -> PeftModel:
    return get_peft_model(base, dvora.DVoRAConfig(r=64, target_modules=["0", "2", "5"]))


def pixels(images: Images, *, lying: bool) -> Tensor:
    upright = torch.from_numpy(images.pixels).float().div(255)[:, None]
    return upright.rot90(1, (2, 3)) if lying else upright


def fit(module: Digits, images: Images, epochs: int, folder: Path, *, lying: bool, resumed: Path | None = None) -> None:
    # Lightning's checkpoints have no state of random generators: what goes on bit for bit uses none.
    loader = DataLoader(TensorDataset(pixels(images, lying=lying), torch.from_numpy(images.labels)), 64)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, "{epoch}", every_n_epochs=SAVED_AFTER, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=resumed)


@torch.no_grad()
def logits(model: nn.Module, images: Images) -> Tensor:
    return model.eval()(pixels(images, lying=True))


def main(folder: Path) -> None:
    task = digits()
    labels = torch.from_numpy(task.test.labels)
    base = network()
    fit(Digits(base, 0.003), task.train, 6, folder / "base", lying=False)
    again = [copy.deepcopy(base) for _ in range(2)]
    untouched, start = frozen_digest(base), logits(base, task.test)

    model = adapted(base)
    fit(Digits(model, 0.03), task.train, EPOCHS, folder / "run", lying=True)
    end = logits(model, task.test)
    require(frozen_digest(model) == untouched, "the base keeps every bit")

    checkpoint = folder / "run" / f"epoch={SAVED_AFTER - 1}.ckpt"
    resumed = adapted(again[0])
    fit(Digits(resumed, 0.03), task.train, EPOCHS, folder / "resumed", lying=True, resumed=checkpoint)
    require(same_bits(end, logits(resumed, task.test)), "a run that goes on from a checkpoint ends bit for bit alike")
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(again[1], folder / "adapter")
    require(same_bits(end, logits(loaded, task.test)), "the saved adapter gives the same outputs on a new base")
    accuracy = [(scores.argmax(1) == labels).double().mean().item() for scores in (start, end)]
    require(accuracy[1] > accuracy[0] + 0.2, f"digits that lie on their side are read better: {accuracy}")
    report(
        {
            "works": True,
            "figures": {
                "test_accuracy": accuracy,
                "trained_values": trained_parameters(model),
                "adapter_bytes": folder_bytes(folder / "adapter"),
                "checkpoint_bytes": checkpoint.stat().st_size,
            },
            "versions": {"lightning": version("lightning")},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
