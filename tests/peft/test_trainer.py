"""transformers' Trainer: a run that was killed goes on as if nothing had happened."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from dvora import DVoRAConfig
from tests.fresh import FRESH
from tests.peft.tiny import LAYERS, MODELS

STEPS, SAVED_EVERY = 10, 4


class Steps(TrainerCallback):
    """Counts the steps of this process, and ends it after one as a power failure would."""

    def __init__(self, last: int | None) -> None:
        self.made, self.last = 0, last

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        self.made += 1
        if state.global_step == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, killed_at: int | None, results: Any) -> None:
    """Put the losses of all steps, the trained vectors, and how many steps this process made."""
    torch.set_num_threads(1)
    config = DVoRAConfig(r=6, target_modules=LAYERS["llama"], dvora_dropout=0.1)
    model = get_peft_model(MODELS["llama"](), config)
    tokens = torch.randint(3, 40, (24, 8), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=SAVED_EVERY,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    steps = Steps(killed_at)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[steps],
    )
    saved = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=saved)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    trained = {n: p.detach().tolist() for n, p in model.named_parameters() if p.requires_grad}
    results.put({"losses": losses, "vectors": trained, "steps_made": steps.made})


def run(folder: Path, killed_at: int | None = None) -> tuple[dict[str, Any] | None, int | None]:
    """What a process of its own has put, and how it ended."""
    results = FRESH.SimpleQueue()
    process = FRESH.Process(target=train, args=(folder, killed_at, results))
    process.start()
    process.join(180)
    return (None if results.empty() else results.get()), process.exitcode


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, ended = run(tmp_path / "whole")
    assert ended == 0
    assert whole["steps_made"] == STEPS
    assert list(whole["losses"]) == list(range(1, STEPS + 1))
    assert run(tmp_path / "killed", SAVED_EVERY + 2) == (None, -signal.SIGKILL)
    assert [folder.name for folder in (tmp_path / "killed").iterdir()] == [f"checkpoint-{SAVED_EVERY}"]
    assert run(tmp_path / "killed") == ({**whole, "steps_made": STEPS - SAVED_EVERY}, 0)
