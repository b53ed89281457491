"""A classifier for every tenant: DVoRA's side by side through a bank, the others' one after another, in equal steps."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer

import dvora
from benchmarks.methods import peft_config
from benchmarks.quality.adapting import adapted, saved_bytes
from benchmarks.quality.evaluation import Evaluation
from benchmarks.quality.grid import Grid, Run, TaskPlan, read_grid
from benchmarks.quality.labelled import Labelled, Part
from benchmarks.quality.models import SentenceReader, quietly
from benchmarks.quality.training import FALLS, precision, rate_at, trained
from benchmarks.tenants.sources import KINDS, tenants
from materials.batches import Sentences, unlabelled
from materials.models import minilm

ARMS = ("frozen", "dvora_r64", "magnitude", "hyperadapt", "lora_r1", "lora_r8")
"""Of the grid of `benchmarks.quality`, with the rates that are tried there first."""
IN_BANK = ("dvora_r64", "magnitude")
TASK = "tenants"
PLAN = TaskPlan("minilm", steps=60, batch=8, train=1000, validation=1000, test=1000)
"""Of every tenant; all of its rows are used, in the batches."""
TUNED_ON = 6
"""Every sixth tenant chooses the rates."""
TOGETHER = 8
"""Tenants in a step of the bank."""
BATCHES = 4
"""Of such a step, of rows of like length: in one, all would be padded to the longest."""


def grid_of_tenants() -> Grid:
    """The arms as the grid has them; all tenants are one task, and get one rate."""
    grid = read_grid()
    arms = {name: replace(grid.arms[name], tasks=None) for name in ARMS}
    return replace(grid, tasks={TASK: PLAN}, arms=arms, training={**grid.training, "final_seeds": [0]})


def carry_out(run: Run) -> dict[str, Any]:
    """The row of a run: means over its tenants, and the score of each."""
    start, grid = perf_counter(), grid_of_tenants()
    part, every = ("validation", TUNED_ON) if run.stage == "trial" else ("test", 1)
    with quietly():
        some = all_tenants(1 if run.arm == "frozen" else 2)[::every]
        evaluations = (_in_bank if run.arm in IN_BANK else _one_by_one)(grid, run, some, part)
        with tempfile.TemporaryDirectory() as folder:
            sizes = saved_bytes(reader_of(grid, run, some[0]).backbone, Path(folder)) if run.rates else {}
    loss, score = (float(np.mean([getattr(each, of) for each in evaluations])) for of in ("loss", "score"))
    return {
        **{"key": run.key, **vars(run), "rates": run.rates and vars(run.rates)},
        part: {"loss": loss if math.isfinite(loss) else None, "score": score},
        "scores": {tenant.name: round(of.score, 5) for tenant, of in zip(some, evaluations, strict=True)},
        **sizes,
        "seconds": round(perf_counter() - start, 1),
    }


@lru_cache(maxsize=2)
def all_tenants(divisor: int) -> list[Labelled]:
    """Read and tokenised once a process.

    Args:
        divisor: the head is fitted to the first of so many equal parts of the training rows. All arms but the head
            alone start from one of half of the rows, since a head that knows all rows leaves little to learn.
    """
    tokenizer, found = AutoTokenizer.from_pretrained(minilm()), []
    for task in tenants(KINDS):
        parts = {
            name: Part(unlabelled(some.texts, tokenizer), torch.from_numpy(some.labels))
            for name, some in (("train", task.train), ("validation", task.validation), ("test", task.test))
        }
        rows, count = parts["train"], len(task.train) // divisor
        first = Part(rows.sentences.first(count), rows.labels[:count])
        parts = {**parts, "train": first, "batches": rows}
        found.append(Labelled(task.name, replace(PLAN, train=count), parts, len(task.classes)))
    return found


def _one_by_one(grid: Grid, run: Run, some: Sequence[Labelled], part: str) -> list[Evaluation]:
    evaluations = []
    for tenant in some:
        reader = reader_of(grid, run, tenant)
        if run.steps:
            trained(grid, run, tenant, reader)
        with precision():
            evaluations.append(tenant.evaluate(reader, part))
    return evaluations


def _in_bank(grid: Grid, run: Run, some: Sequence[Labelled], part: str) -> list[Evaluation]:
    with bank_of(grid, run, some) as (bank, model):
        for first in range(0, len(some), TOGETHER):
            for _ in steps_together(grid, run, bank, model, some[first : first + TOGETHER]):
                pass

        @torch.no_grad()
        def answer(name: str, batch: dict[str, Tensor]) -> Tensor:
            with bank.rows([name] * len(batch["ids"])), precision():
                outputs: Tensor = model(batch)
            return outputs

        return [tenant.evaluate(partial(answer, tenant.name), part) for tenant in some]


@contextmanager
def bank_of(grid: Grid, run: Run, some: Sequence[Labelled]) -> Iterator[tuple[dvora.AdapterBank, SentenceReader]]:
    """A bank of each tenant's untrained adapter and fitted head, and the model that it serves."""
    arm, layers = grid.arms[run.arm], grid.layers[PLAN.model]
    options = {**arm.options, "modules_to_save": ["head"]}
    config = peft_config(arm.method, arm.r, f"{layers['attention']}|{layers['feed_forward']}", run.seed, options)
    model = some[0].model("float32").requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        for tenant in some:
            get_peft_model(tenant.model("float32"), config).save_pretrained(f"{folder}/{tenant.name}")
        with dvora.AdapterBank(model, like=f"{folder}/{some[0].name}") as bank:
            for tenant in some:
                bank.add(tenant.name, f"{folder}/{tenant.name}", allow_unchanged=True)
            yield bank, model


def steps_together(
    grid: Grid,
    run: Run,
    bank: dvora.AdapterBank,
    model: SentenceReader,
    some: Sequence[Labelled],
    precision: Callable[[], AbstractContextManager[object]] = precision,
) -> Iterator[None]:
    """Steps with the rows that each tenant's own steps would have, one at a time; published after the last."""
    arm, rates, parts = grid.arms[run.arm], run.rates, [tenant.parts["batches"] for tenant in some]
    every = tuple(ids for part in parts for ids in part.sentences.ids)
    rows = Sentences(every, torch.cat([part.labels for part in parts]), parts[0].sentences.padding)
    firsts = np.cumsum([0, *(len(part.labels) for part in parts[:-1])])
    adapters = bank.trainable([tenant.name for tenant in some])
    own_rates = {"magnitude": rates.magnitude or rates.adapter, "head": rates.head}
    optimizer = torch.optim.AdamW(adapters.parameter_groups(rates.adapter, learning_rates=own_rates), foreach=True)
    schedule = LambdaLR(optimizer, rate_at(run.steps, grid.training["warmup"], FALLS[arm.schedule]))
    names = np.array([tenant.name for tenant in some for _ in range(PLAN.batch)])
    for of_tenants in zip(*(tenant.batches(run.seed, run.steps) for tenant in some), strict=True):
        chosen = np.concatenate([first + own for first, own in zip(firsts, of_tenants, strict=True)])
        for batch in np.array_split(np.argsort([len(every[row]) for row in chosen], kind="stable"), BATCHES):
            ids, mask = rows.batch(chosen[batch])
            with adapters.rows(names[batch].tolist()):
                with precision():
                    outputs = model({"ids": ids, "mask": mask})
                # Of every tenant the mean over its rows of the step, wherever they are.
                (cross_entropy(outputs, rows.labels[chosen[batch]], reduction="sum") / PLAN.batch).backward()
        adapters.clip_grad_norm_(grid.training["max_gradient_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield
    bank.publish(adapters)


def reader_of(grid: Grid, run: Run, tenant: Labelled) -> SentenceReader:
    """As an arm starts: the fitted head behind what the arm adapts."""
    reader = tenant.model("float32")
    if run.rates:
        reader.backbone = adapted(reader.backbone, grid.arms[run.arm], grid.layers[PLAN.model], run.seed)
    return reader
