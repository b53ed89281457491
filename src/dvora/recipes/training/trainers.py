"""transformers' Trainer, set up for a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, set_seed

from ...training import check_ranks_agree
from ..data.run_data import Data
from ..models.bases import Base
from ..run_folder import CHECKPOINTS, world_size
from ..settings import EPOCHS, MOST_STEPS, Group, Settings
from ..tasks.evaluation import Evaluated, common_arguments, evaluated, simplest_guess_on
from ..tasks.metrics import GREATER_IS_BETTER
from ..tasks.task import Task, without_bytes
from .callbacks import OnProgress, RunCallback, StopRequest
from .methods import optimizer


@dataclass(frozen=True)
class Prepared:
    """What a trainer is made of: settings, rows, the base before it was adapted, the adapted model, and its task.

    Args:
        datasets: the model's inputs, of the parts that have rows.
        rates: learning rates of the groups that have their own.
        head_alone: the baseline; None where there is none.
        head_outputs: its outputs for the rows of the held-out parts.
        head_at_start: what the model's last layer was at first; None where the model brings a trained one.
        start: what is trained, as it was before, if that may be what is saved.
    """

    settings: Settings
    data: Data
    base: Base
    model: nn.Module
    task: Task
    datasets: Mapping[str, Any]
    rates: dict[Group, float]
    head_alone: nn.Linear | None = None
    head_outputs: Mapping[str, Tensor] = field(default_factory=dict)
    head_at_start: nn.Linear | None = None
    start: Mapping[str, Tensor] = field(default_factory=dict)


def length_of_run(settings: Settings, rows: int) -> tuple[float, int | None]:
    """Epochs, and steps where these end it, of a run over so many training rows.

    A run that says neither reads the rows `EPOCHS` times, in `MOST_STEPS` steps at most.
    """
    if settings.epochs is not None or settings.max_steps is not None:
        return settings.epochs or EPOCHS, settings.max_steps
    rows_of_step = settings.batch_size * settings.accumulation * world_size()
    return EPOCHS, MOST_STEPS if EPOCHS * ceil(rows / rows_of_step) > MOST_STEPS else None


def make_trainer(prepared: Prepared, stop: StopRequest, on_progress: OnProgress | None) -> tuple[Any, RunCallback]:
    """The trainer of a run, and the callback that knows whether it was stopped.

    Raises:
        ValueError: a setting does not fit this machine, or processes hold different adapters.
    """
    settings, task, datasets = prepared.settings, prepared.task, prepared.datasets
    arguments, callback = _arguments(settings, task, datasets), RunCallback(stop, on_progress)
    callbacks: list[Any] = [callback]
    if settings.early_stopping and "validation" in datasets:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping))
    if settings.method == "dvora" and world_size() > 1:
        check_ranks_agree(prepared.model)
    if settings.gradient_checkpointing:
        prepared.base.model.config.use_cache = False
        prepared.base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The order of rows and dropout start from the seed, whatever was drawn before.
    set_seed(settings.seed)
    trainer = Trainer(
        prepared.model,
        arguments,
        data_collator=task.collator,
        train_dataset=without_bytes(datasets["train"]),
        eval_dataset=without_bytes(datasets["validation"]) if "validation" in datasets else None,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.reduce_logits,
        callbacks=callbacks,
        optimizers=(optimizer(prepared.model, settings, prepared.base.heads, prepared.rates), None),
    )
    # transformers takes a model whose forward has keyword arguments for one that divides its loss by the tokens of all
    # batches and processes. Classifiers do not, so their gradients would be multiplied by both.
    trainer.model_accepts_loss_kwargs = settings.task == "causal-lm"
    trainer.remove_callback(PrinterCallback)
    return trainer, callback


def final_results(trainer: Any, prepared: Prepared, given: Mapping[str, Evaluated]) -> dict[str, Evaluated]:
    """The model on the held-out parts, each before what it is compared with, by the keys of run.json's metrics.

    Those of the head alone are given; the simplest guess, or a language model's base, is evaluated here.
    """
    task, data, found = prepared.task, prepared.data, dict[str, Evaluated]()
    for part in ("validation", "test"):
        if part not in prepared.datasets:
            continue
        found[part] = evaluated(trainer, task, prepared.datasets[part])
        found |= {key: of_part for key, of_part in given.items() if key.startswith(part)}
        if task.best in ("accuracy", "rmse"):
            found[f"{part}_simplest_guess"] = simplest_guess_on(task, data.train, getattr(data, part), data.labels)
        elif prepared.settings.task == "causal-lm" and isinstance(prepared.model, PeftModel):
            with prepared.model.disable_adapter():
                found[f"{part}_before_training"] = evaluated(trainer, task, prepared.datasets[part])
    return found


def _arguments(settings: Settings, task: Task, datasets: Mapping[str, Any]) -> TrainingArguments:
    validates = "validation" in datasets
    epochs, max_steps = length_of_run(settings, len(datasets["train"]))
    common = common_arguments(settings, Path(settings.output) / CHECKPOINTS)
    evaluates = ("steps" if settings.evaluate_every else "epoch") if validates else "no"
    saves = "steps" if settings.save_every or settings.evaluate_every else "epoch"
    return TrainingArguments(
        **common,
        num_train_epochs=epochs,
        max_steps=max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        # Below one it is a share of all steps.
        warmup_steps=settings.warmup_share,
        max_grad_norm=settings.max_gradient_norm,
        eval_strategy=evaluates,
        eval_steps=settings.evaluate_every,
        save_strategy=saves,
        save_steps=settings.save_every or settings.evaluate_every or 500,
        save_total_limit=2,
        load_best_model_at_end=settings.keep_best and validates,
        metric_for_best_model=task.best if validates else None,
        greater_is_better=GREATER_IS_BETTER[task.best] if validates else None,
        logging_steps=1,
        # How often there was no better evaluation.
        restore_callback_states_from_checkpoint=True,
        seed=settings.seed,
        data_seed=settings.seed,
    )
