"""The task of the vision examples: who reads upright digits learns, in an adapter, those that lie on their side."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import dvora
from dvora.training import parameter_groups
from examples.checks import folder_bytes, require, same_bits, trained_parameters
from materials.data import digits
from materials.splits import Images

BATCH, SIZE = 64, 32


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


def adapted_and_checked(
    network: Callable[[], nn.Module], config: dvora.DVoRAConfig, base_steps: int, steps: int
) -> dict[str, Any]:
    """Train the base and its adapter, save, load and merge it, and check every step; the metrics of the report.

    Args:
        network: makes the untrained base, in evaluation mode.
        config: of the adapter; it trains the head whole.
        base_steps, steps: of the base and of the adapter.
    """
    task = digits()
    labels = torch.from_numpy(task.test.labels)
    base = network()
    train(base.train(), task.train, torch.optim.AdamW(base.parameters(), 2e-3), base_steps, lying=False)
    before, start = {n: v.clone() for n, v in base.state_dict().items()}, logits(base, task.test)

    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.03, learning_rates={"magnitude": 0.005, "head": 0.005}))
    # In evaluation: batch normalisation would go on to average what it sees, and adapters' files do not hold that.
    train(model.eval(), task.train, optimizer, steps, lying=True)
    end = logits(model, task.test)

    with torch.no_grad(), model.disable_adapter():
        require(same_bits(logits(model, task.test), start), "without its adapter the model is the base")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = network()
        fresh.load_state_dict(before)
        loaded = PeftModel.from_pretrained(fresh, folder)
        size = folder_bytes(Path(folder))
    require(same_bits(logits(loaded, task.test), end), "the saved adapter gives the same outputs on a new base")
    merged = loaded.merge_and_unload()
    difference = ((logits(merged, task.test) - end).abs().max() / end.abs().max()).item()
    require(difference < 1e-4, f"the merged model is the adapted one to rounding: {difference}")
    accuracy = [(scores.argmax(1) == labels).double().mean().item() for scores in (start, end)]
    require(accuracy[1] > accuracy[0] + 0.2, f"digits that lie on their side are read better: {accuracy}")
    return {
        "test_accuracy": accuracy,
        "trained_values": trained_parameters(model),
        "adapter_bytes": size,
        "merged_difference": difference,
    }
