"""An adapter for each of many speakers of Shakespeare's plays, trained together, beside one adapter for all.

All arms train on the same rows in the same order, for as many steps: one adapter for all; one for each speaker; and one
for each that starts, after half of the steps, from one for all. Whole scenes are held out.
`python -m examples.speakers` takes four speakers and less than a minute, with `--full` fifty.
"""

import argparse
import tempfile
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from transformers import AutoTokenizer

import dvora
from dvora.bank import TrainableAdapters
from examples.checks import frozen_digest, report, require
from examples.spoken_lines import spoken_lines
from examples.top_layers import TopLayers
from materials.models import smollm2

BASE, ALL, EACH, BOTH = "base", "one for all", "one for each", "one for each, from one for all"
LAYERS = 4
RATES = {ALL: 0.04, EACH: 0.02, BOTH: 0.01}
"""Chosen on scenes for development with a third of the speakers and steps; the last is after half of the steps."""
Losses = dict[str, list[float]]
"""Of each speaker, by arm."""


class Setting(NamedTuple):
    """How many speakers, steps (of every arm) and rows of a step, and the learning rates."""

    speakers: int
    steps: int
    batch: int
    rates: dict[str, float]


QUICK, FULL = Setting(4, 12, 8, RATES), Setting(50, 200, 16, RATES)


class Run:
    """Every arm with one seed: of the order of rows, and of the random matrices."""

    def __init__(self, top: TopLayers, speakers: Sequence[str], setting: Setting, seed: int, folder: Path) -> None:
        self.speakers, self.rates = list(speakers), setting.rates
        config = dvora.DVoRAConfig(target_modules="all-linear", projection_seed=seed)
        adapted = get_peft_model(top.model, config)
        adapted.save_pretrained(folder)
        self.top = top._replace(model=adapted.unload())
        # An adapter that was not trained says which layers the bank has.
        self.bank = dvora.AdapterBank(self.top.model, like=folder)
        whole = torch.cartesian_prod(*(torch.arange(size) for size in top.targets["train"].shape[:2]))
        passes, generator = -(-setting.steps * setting.batch // len(whole)), torch.Generator().manual_seed(seed)
        rows = torch.cat([whole[torch.randperm(len(whole), generator=generator)] for _ in range(passes)])
        self.batches = rows.split(setting.batch)[: setting.steps]

    def train(self, adapters: TrainableAdapters, batches: Sequence[Tensor], rate: float) -> None:
        """Steps on batches of (speaker, row), and serve what they made."""
        optimizer = torch.optim.AdamW(adapters.parameter_groups(rate), foreach=True)
        schedule = LinearLR(optimizer, 1.0, 0.1, len(batches))
        names = self.speakers if len(adapters.names) > 1 else [ALL] * len(self.speakers)
        for batch in batches:
            speakers, rows = batch.unbind(1)
            with adapters.rows([names[speaker] for speaker in speakers.tolist()]) as trained:
                trained.loss(self.top.losses("train", speakers, rows)).backward()
            norms = adapters.clip_grad_norm_(1.0)
            require(all(map(isfinite, norms.values())), "no adapter diverges")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.bank.publish(adapters)

    @torch.no_grad()
    def losses(self, part: str, names: Sequence[str | None]) -> list[float]:
        """Of each speaker, with the adapter of that name."""
        rows = torch.arange(self.top.targets[part].shape[1])
        losses = []
        for speaker, name in enumerate(names):
            with self.bank.rows([name] * len(rows)):
                losses.append(self.top.losses(part, torch.full_like(rows, speaker), rows).mean().item())
        return losses

    def compare(self, part: str) -> Losses:
        """Train every arm, and judge it on a part of the data."""
        half, one = len(self.batches) // 2, [ALL] * len(self.speakers)
        base = self.losses(part, [None] * len(one))
        shared = self.bank.trainable(new=[ALL])
        self.train(shared, self.batches[:half], self.rates[ALL])
        for name in self.speakers:
            self.bank.add(name, shared.flat_vector(ALL))
        each = self.bank.trainable(self.speakers)
        self.train(each, self.batches[half:], self.rates[BOTH])
        both = self.losses(part, self.speakers)
        for name in (ALL, *self.speakers):
            self.bank.remove(name)
        self.train(self.bank.trainable(new=[ALL]), self.batches, self.rates[ALL])
        self.train(self.bank.trainable(new=self.speakers), self.batches, self.rates[EACH])
        return {BASE: base, ALL: self.losses(part, one), EACH: self.losses(part, self.speakers), BOTH: both}


def run(setting: Setting, seeds: Sequence[int], part: str = "test") -> tuple[list[str], list[Losses]]:
    """The speakers, and their losses of every seed."""
    lines = spoken_lines(AutoTokenizer.from_pretrained(smollm2()), setting.speakers)
    top = TopLayers.of({name: lines.parts[name] for name in ("train", part)}, LAYERS)
    untouched, found = frozen_digest(top.model), []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            arms = Run(top, lines.speakers, setting, seed, Path(folder))
            with arms.bank:
                found.append(arms.compare(part))
    require(frozen_digest(top.model) == untouched, "the base keeps every bit")
    return lines.speakers, found


def show(speakers: Sequence[str], losses: Losses) -> None:
    """A table in the terminal."""
    table = Table("speaker", *losses, title="loss a token on scenes that were held out")
    for row, speaker in enumerate([*speakers, "mean"]):
        table.add_row(speaker, *(f"{(each[row] if speaker != 'mean' else mean(each)):.3f}" for each in losses.values()))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.speakers")
    parser.add_argument("--full", action="store_true", help="fifty speakers")
    setting = FULL if parser.parse_args().full else QUICK
    torch.set_num_threads(1)
    speakers, (losses,) = run(setting, [0])
    show(speakers, losses)
    figures = {arm: mean(each) for arm, each in losses.items()}
    for arm in (ALL, EACH, BOTH):
        require(figures[arm] < figures[BASE], f"{arm} is better than the base")
    report({"works": True, "figures": {"speakers": len(speakers), **figures}, "versions": {}})
