"""An adapter for every user: DVoRA's side by side through a bank, PEFT's others one after another, on the same rows."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import dvora
from benchmarks.quality.adapting import magnitude_only, saved_bytes
from dvora.bank import TenantAdamW
from examples.top_layers import TopLayers

LAYERS = 4
"""Of SmolLM2, at the top, are adapted; what is below is computed once."""
BATCH = 4
"""Rows of a user in a step."""
PASSES = 4
"""Over a user's rows."""
TOGETHER = 4
"""Users in a step of the bank."""
EVERY_LAYER = r".*\.([qkvo]|gate|up|down)_proj"


class Arm(NamedTuple):
    """A method: its configuration by seed, and the rates that are tried."""

    config: Callable[[int], PeftConfig]
    rates: tuple[float, ...]


ARMS: Mapping[str, Arm] = {
    "structured_r64": Arm(
        lambda seed: dvora.DVoRAConfig(
            r=64, target_modules="all-linear", projection_init="structured", projection_seed=seed
        ),
        (0.01, 0.03, 0.09),
    ),
    "magnitude": Arm(lambda _: magnitude_only(EVERY_LAYER), (0.01, 0.03, 0.09)),
    "lora_r1": Arm(lambda seed: LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"), (0.001, 0.003, 0.009)),
    "lora_r8": Arm(lambda seed: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), (0.0007, 0.002, 0.006)),
    "vera_r256": Arm(
        lambda seed: VeraConfig(r=256, target_modules="all-linear", projection_prng_key=seed), (0.01, 0.03, 0.09)
    ),
}
"""By the names in the result file."""
IN_BANK = ("structured_r64", "magnitude")


class Outcome(NamedTuple):
    """Losses of each user on held-out rows, and the bytes of one user's adapter, as `saved_bytes` counts them."""

    losses: list[float]
    sizes: dict[str, int]


def run(top: TopLayers, arm: str, rate: float, rows: int, seed: int, part: str) -> Outcome:
    """An adapter for each user, trained on its first `rows` rows.

    Args:
        top: layers and rows of all users; its model is as it was afterwards.
        part: that is evaluated.
    """
    users = len(top.targets["train"])
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack(
        [torch.cat([torch.randperm(rows, generator=generator) for _ in range(PASSES)]) for _ in range(users)]
    )
    each = _in_bank if arm in IN_BANK else _one_by_one
    return each(top, arm, rate, order, seed, part)


def base(top: TopLayers, part: str) -> list[float]:
    """Losses of each user without an adapter."""
    return [_loss(top, part, user) for user in range(len(top.targets[part]))]


def _in_bank(top: TopLayers, arm: str, rate: float, order: Tensor, seed: int, part: str) -> Outcome:
    names = [str(user) for user in range(len(order))]
    with tempfile.TemporaryDirectory() as folder:
        fresh = get_peft_model(top.model, ARMS[arm].config(seed))
        sizes = saved_bytes(fresh, Path(folder))
        plain = top._replace(model=fresh.unload())
        with dvora.AdapterBank(plain.model, like=folder) as bank:
            for first in range(0, len(names), TOGETHER):
                chosen = names[first : first + TOGETHER]
                adapters = bank.trainable(new=chosen)
                optimizer = TenantAdamW(adapters, rate, max_grad_norm=1.0)
                batches = order[first : first + TOGETHER].split(BATCH, dim=1)
                schedule = LinearLR(optimizer, 1.0, 0.1, len(batches))
                users = torch.arange(first, first + len(chosen)).repeat_interleave(BATCH)
                for batch in batches:
                    with adapters.rows([names[user] for user in users.tolist()]) as trained:
                        trained.loss(plain.losses("train", users, batch.flatten())).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                bank.publish(adapters)
            losses = []
            for user, name in enumerate(names):
                with bank.rows([name] * plain.targets[part].shape[1]):
                    losses.append(_loss(plain, part, user))
    return Outcome(losses, sizes)


def _one_by_one(top: TopLayers, arm: str, rate: float, order: Tensor, seed: int, part: str) -> Outcome:
    losses, sizes = [], {}
    for user, rows in enumerate(order):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(top.model, ARMS[arm].config(seed))
        mine = top._replace(model=adapted)
        _train(mine, rate, user, rows.split(BATCH))
        losses.append(_loss(mine, part, user))
        if user == 0:
            with tempfile.TemporaryDirectory() as folder:
                sizes = saved_bytes(adapted, Path(folder))
        adapted.unload()
    return Outcome(losses, sizes)


def _train(top: TopLayers, rate: float, user: int, batches: Sequence[Tensor]) -> None:
    trained = [each for each in top.model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    schedule = LinearLR(optimizer, 1.0, 0.1, len(batches))
    for batch in batches:
        top.losses("train", torch.full_like(batch, user), batch).mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def _loss(top: TopLayers, part: str, user: int) -> float:
    """Of one user, with what the model has now."""
    rows = torch.arange(top.targets[part].shape[1])
    return top.losses(part, torch.full_like(rows, user), rows).mean().item()
