"""The learning rate "auto": short trials on a run's own rows, each from the run's own fresh start, before it begins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...training import RatePlan, RateTrial, find_rate, rate_plan
from ...training.rate_search import shortest_run
from ..run_folder import SEARCH
from ..settings import AUTO, LEARNING_RATES, Settings, resolved
from .fresh_start import as_it_was
from .trainers import Prepared, make_trial_trainer, rows_of_step, steps_of_run
from .watching import OnProgress, StopRequest, TrialWatching

LEAST_ROWS = 100
"""Validation rows of a trial, where there are so many; a long one has as many as it reads training rows."""


class StoppedError(Exception):
    """Somebody asked to stop during the trials."""


@dataclass(frozen=True)
class Reports:
    """Whom the trials of a run listen and talk to.

    Args:
        stop: whether to stop after the step that is being made.
        on_progress: called after every step.
        note: called with what the trials cost, with each one's loss, and with what is chosen.
        save: writes the run's record, after every trial.
    """

    stop: StopRequest
    on_progress: OnProgress | None
    note: Callable[[str], None]
    save: Callable[[], None]


def settled(prepared: Prepared, record: dict[str, Any], note: Callable[[str], None]) -> Settings | None:
    """The settings with a number for the learning rate; None if trials have to find it.

    A run that can have no trials gets the default rates of its method.

    Args:
        prepared: the run.
        record: of the run: what trials found when it started, or why there are none.
        note: called with what was chosen in place of "auto".

    Raises:
        ValueError: what is recorded is damaged.
    """
    settings = prepared.settings
    if settings.learning_rate != AUTO:
        return settings
    if reason := _against_trials(prepared):
        settings = resolved(settings.model_copy(update={"learning_rate": None}))
        note(f"learning rate: {settings.rate:g}, the default of {settings.method}: {reason}")
        record[SEARCH] = {"rate": settings.rate, "trials": [], "reason": reason}
        return settings
    rate, _ = _recorded(record)
    if rate is None:
        return None
    note(f"learning rate: {rate:g}, found when the run started")
    return _at(settings, rate)


def check_trials(prepared: Prepared) -> None:
    """Find what does not fit before the first trial.

    Raises:
        ValueError: a setting does not fit the model or this machine, processes hold different adapters, or they will
            shard the model.
    """
    settings = prepared.settings
    first = replace(prepared, settings=_at(settings, LEARNING_RATES[settings.method]))
    with as_it_was(prepared.model):
        trainer = make_trial_trainer(first, 1, None, TrialWatching(StopRequest(), None, 1))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"learning_rate is {AUTO}, but FSDP or DeepSpeed will shard the model, which no trial can undo; give a "
            "number, or train without them"
        )


def found(prepared: Prepared, record: dict[str, Any], reports: Reports) -> Settings:
    """The settings with the learning rate that trials find; they leave nothing behind in the model.

    Args:
        prepared: the run, of which nothing has been trained.
        record: of the run, which gets the trials; those that it has from an earlier start are not made again.
        reports: whom they listen and talk to.

    Raises:
        StoppedError: somebody asked to stop; the record has the trials that were made.
        ValueError: training diverged in every trial, or what is recorded is damaged.
    """
    settings, plan = prepared.settings, _plan(prepared)
    validation = _some_of(prepared.datasets["validation"], plan.steps * rows_of_step(settings))
    _, losses = _recorded(record)
    if record.get(SEARCH, {}).get("steps") != plan.steps:
        losses = {}
    trials: list[dict[str, Any]] = []
    record[SEARCH] = {"steps": plan.steps, "validation_rows": len(validation), "trials": trials}
    reports.note(
        f"learning rate: up to {plan.trials} trials of {plan.steps} steps will find it, {plan.share:.0%} of the run's "
        f"{plan.run_steps:,} steps; each is validated on {len(validation):,} rows"
    )

    def trial(rate: float, steps: int) -> float:
        number, is_new = len(trials) + 1, rate not in losses
        if is_new:
            at_rate = replace(prepared, settings=_at(settings, rate))
            losses[rate] = _loss_of_trial(at_rate, steps, validation, number, reports)
        trials.append(RateTrial(rate, losses[rate]).to_dict())
        reports.note(f"trial {number}: learning rate {rate:g}, {_shown(losses[rate])}")
        if is_new:
            reports.save()
        return losses[rate]

    search = find_rate(trial, plan.run_steps, center=LEARNING_RATES[settings.method])
    record[SEARCH] |= search.to_dict()
    reports.note(f"learning rate: {search.rate:g}, by the validation losses of {len(trials)} trials")
    return _at(settings, search.rate)


def _loss_of_trial(prepared: Prepared, steps: int, validation: Any, number: int, reports: Reports) -> float:
    watching = TrialWatching(reports.stop, reports.on_progress, number)
    with as_it_was(prepared.model):
        trainer = make_trial_trainer(prepared, steps, validation, watching)
        trainer.train()
        if watching.was_stopped:
            raise StoppedError
        return _of_first_process(trainer.evaluate()["eval_loss"], trainer.args.device)


def _of_first_process(loss: float, device: torch.device) -> float:
    """The loss by which all processes choose the same rate, whatever they round differently."""
    if not dist.is_initialized():
        return loss
    value = torch.tensor(loss, device=device)
    dist.broadcast(value, 0)
    return value.item()


def _plan(prepared: Prepared) -> RatePlan:
    return rate_plan(steps_of_run(prepared.settings, len(prepared.datasets["train"])))


def _against_trials(prepared: Prepared) -> str:
    """Why a run can have no trials; empty if it can."""
    if "validation" not in prepared.datasets:
        return "without validation rows no trial can be compared with another"
    plan = _plan(prepared)
    if not plan.trials:
        return f"a run of {plan.run_steps} steps is too short for trials, which take {shortest_run()} steps or more"
    return ""


def _some_of(dataset: Any, rows: int) -> Any:
    """At most so many rows of a dataset, and `LEAST_ROWS` in any case, evenly from all of it."""
    most = min(len(dataset), max(rows, LEAST_ROWS))
    return dataset.select(np.linspace(0, len(dataset) - 1, most).round().astype(int))


def _at(settings: Settings, rate: float) -> Settings:
    return settings.model_copy(update={"learning_rate": rate})


def _recorded(record: Mapping[str, Any]) -> tuple[float | None, dict[float, float]]:
    """The rate that a run found when it started, if it did, and the losses of its trials.

    Raises:
        ValueError: they are not what `dvora train` writes.
    """
    search = record.get(SEARCH, {"trials": []})
    try:
        losses = {each["rate"]: inf if each["loss"] is None else each["loss"] for each in search["trials"]}
        rate = search.get("rate")
        rates = [*losses, *([] if rate is None else [rate])]
        if not all(each > 0 and isfinite(each) for each in rates) or any(map(isnan, losses.values())):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"the record of the run is damaged: {SEARCH} is not what `dvora train` writes") from None
    return rate, losses


def _shown(loss: float) -> str:
    return f"validation loss {loss:.4g}" if isfinite(loss) else "diverged"
