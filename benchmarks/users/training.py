"""An adapter for every user: DVoRA's side by side through a bank, PEFT's others one after another, on the same rows."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import dvora
from benchmarks.methods import peft_config
from benchmarks.quality.adapting import saved_bytes
from benchmarks.users.jobs import Job
from benchmarks.users.sources import SOURCES
from dvora.bank import TenantAdamW
from examples.top_layers import TopLayers

USERS, TUNED_ON = 50, 12
"""Users, and how many of them choose the rates, on rows for development."""

LAYERS = 4
"""Of SmolLM2, at the top, are adapted; what is below is computed once."""
BATCH = 4
"""Rows of a user in a step."""
PASSES = 4
"""Over a user's rows."""
TOGETHER = 4
"""Users in a step of the bank."""
EVERY_LAYER = r".*\.([qkvo]|gate|up|down)_proj"


ARMS: Mapping[str, tuple[str, int | None, str]] = {
    "structured_r64": ("dvora", 64, "all-linear"),
    "magnitude": ("magnitude", None, EVERY_LAYER),
    "lora_r1": ("lora", 1, "all-linear"),
    "lora_r8": ("lora", 8, "all-linear"),
    "vera_r256": ("vera", 256, "all-linear"),
}
"""Method, rank and layers, by the names in the result file."""
IN_BANK = ("structured_r64", "magnitude")


class Outcome(NamedTuple):
    """Losses of each user on held-out rows, and the bytes of one user's adapter, as `saved_bytes` counts them."""

    losses: list[float]
    sizes: dict[str, int]


def carry_out(job: Job) -> dict[str, Any]:
    """The row of a job."""
    start, top = perf_counter(), _top_layers(job.source, job.part)
    if job.arm == "base":
        outcome = Outcome([_loss(top, job.part, user) for user in range(len(top.targets[job.part]))], {})
    else:
        generator = torch.Generator().manual_seed(job.seed)
        passes = [
            [torch.randperm(job.examples, generator=generator) for _ in range(PASSES)] for _ in top.targets["train"]
        ]
        order = torch.stack([torch.cat(of_user) for of_user in passes])
        train = _in_bank if job.arm in IN_BANK else _one_by_one
        outcome = train(top, _config(job), job.rate, order, job.seed, job.part)
    losses = [round(loss, 4) for loss in outcome.losses]
    return {
        "key": job.key,
        **vars(job),
        **outcome.sizes,
        "losses": losses,
        "seconds": round(perf_counter() - start, 1),
    }


def _config(job: Job) -> PeftConfig:
    method, rank, layers = ARMS[job.arm]
    return peft_config(method, rank, layers, job.seed)


@lru_cache(maxsize=1)
def _top_layers(source: str, part: str) -> TopLayers:
    """Those that are adapted, and the rows of the users who are trained for a part."""
    users = SOURCES[source](USERS)
    some = TUNED_ON if part == "development" else USERS
    return TopLayers.of({name: users.parts[name][:some] for name in ("train", part)}, LAYERS)


def _in_bank(top: TopLayers, config: PeftConfig, rate: float, order: Tensor, seed: int, part: str) -> Outcome:
    names = [str(user) for user in range(len(order))]
    with tempfile.TemporaryDirectory() as folder:
        fresh = get_peft_model(top.model, config)
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


def _one_by_one(top: TopLayers, config: PeftConfig, rate: float, order: Tensor, seed: int, part: str) -> Outcome:
    losses, sizes = [], {}
    for user, rows in enumerate(order):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(top.model, config)
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
