"""torchvision: MobileNetV3, whose pointwise and depthwise convolutions are adapted.

The squeeze-and-excitation convolutions are adapted too, and the head is trained whole. No pretrained weights are at
hand: the base learns upright digits here first, and its adapter learns digits that lie on their side.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models import mobilenet_v3_small

import dvora
from benchmarks.data import digits
from benchmarks.splits import Images
from dvora.training import parameter_groups
from examples.checks import folder_bytes, require, same_bits, trained_values
from examples.report import report

BATCH, BASE_STEPS, STEPS, SIZE = 64, 150, 100, 32


HEAD = "classifier.3"


def network() -> nn.Module:
    torch.manual_seed(0)
    return mobilenet_v3_small(num_classes=10).eval()


def pixels(images: Images, rows: slice | Tensor, *, lying: bool) -> Tensor:
    """Grey digits as the model wants its images: three colours, and larger."""
    upright = torch.from_numpy(images.pixels)[rows].float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)
    return interpolate(upright.rot90(1, (2, 3)) if lying else upright, size=SIZE, mode="bilinear")


def train(model: nn.Module, images: Images, optimizer: torch.optim.Optimizer, steps: int, *, lying: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        cross_entropy(model(pixels(images, rows, lying=lying)), torch.from_numpy(images.labels)[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module, images: Images) -> Tensor:
    return model.eval()(pixels(images, slice(None), lying=True))


def main(folder: Path) -> None:
    task = digits()
    labels = torch.from_numpy(task.test.labels)
    base = network()
    train(base.train(), task.train, torch.optim.AdamW(base.parameters(), 2e-3), BASE_STEPS, lying=False)
    before, start = {n: v.clone() for n, v in base.state_dict().items()}, logits(base, task.test)

    # The lines that matter.
    config = dvora.DVoRAConfig(
        r=64, target_modules=r"features\.(\d+|\d+\.block\.\d+)\.(0|fc1|fc2)|classifier\.0", modules_to_save=[HEAD]
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.03, learning_rates={"magnitude": 0.005, "head": 0.005}))
    # In evaluation: batch normalisation would go on to average what it sees, and adapters' files do not hold that.
    train(model.eval(), task.train, optimizer, STEPS, lying=True)
    end = logits(model, task.test)
    model.save_pretrained(folder)

    with torch.no_grad(), model.disable_adapter():
        require(same_bits(logits(model, task.test), start), "without its adapter the model is the base")
    fresh = network()
    fresh.load_state_dict(before)
    loaded = PeftModel.from_pretrained(fresh, folder)
    require(same_bits(logits(loaded, task.test), end), "the saved adapter gives the same outputs on a new base")
    merged = loaded.merge_and_unload()
    difference = ((logits(merged, task.test) - end).abs().max() / end.abs().max()).item()
    require(difference < 1e-4, f"the merged model is the adapted one to rounding: {difference}")
    accuracy = [(scores.argmax(1) == labels).double().mean().item() for scores in (start, end)]
    require(accuracy[1] > accuracy[0] + 0.2, f"digits that lie on their side are read better: {accuracy}")
    report(
        {
            "works": True,
            "figures": {
                "test_accuracy": accuracy,
                "trained_values": trained_values(model),
                "adapter_bytes": folder_bytes(folder),
                "merged_difference": difference,
            },
            "versions": {"torchvision": version("torchvision").partition("+")[0]},
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
