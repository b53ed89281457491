"""What happens between the steps of training: progress is reported, signals stop it, checkpoints are marked."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from .checkpoints import mark_complete


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Args:
        step: the last one, of `steps`.
        measured: steps of this process after its first one, by which the pace is measured.
        loss: training loss of the last step, None before the first.
        pace: seconds a step took so far, evaluations among them; None before it is measured.
        memory: bytes that the process (on a GPU: torch) has held at most.
        metrics: of an evaluation that just ended, else None.
        is_best: whether that evaluation is the best one so far.
    """

    step: int
    steps: int
    measured: int
    loss: float | None
    pace: float | None
    memory: int
    metrics: dict[str, float] | None = None
    is_best: bool = False

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far."""
        return None if self.pace is None else self.pace * (self.steps - self.step)


OnProgress = Callable[[Progress], None]


class StopRequest:
    """Whether somebody asked this process to stop, by Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.wanted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal; a second one interrupts at once."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


class RunCallback(TrainerCallback):
    """Reports progress, stops with a checkpoint when asked, and marks checkpoints as complete.

    Args:
        stop: whether to stop after this step.
        on_progress: called after every step and evaluation, on the first process.
    """

    def __init__(self, stop: StopRequest, on_progress: OnProgress | None) -> None:
        self.stop, self.on_progress = stop, on_progress
        self.was_stopped = self.stopped_within_epoch = False
        self.started, self.first_step = 0.0, 0
        """When the first step of this process was made; the pace is measured from there, since it warms caches up."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note which step comes first, and find the best checkpoint."""
        self.first_step = state.global_step + 1
        # A checkpoint holds the path of the best one, which is wrong in a run that was moved.
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        state.best_model_checkpoint = str(best) if best.is_dir() else None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop with a checkpoint, if any process was asked to; an evaluation that is due at this step comes first."""
        if _anywhere(self.stop.wanted, args.device) and state.global_step < state.max_steps:
            control.should_training_stop = self.was_stopped = True
            # That of an epoch comes after its last step, and the checkpoint after that.
            has_epochs = "epoch" in (args.eval_strategy, args.save_strategy)
            self.stopped_within_epoch = not (has_epochs and float(state.epoch).is_integer())
            control.should_save = self.stopped_within_epoch
        if state.global_step == self.first_step:
            self.started = time.monotonic()
        self._report(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A stop is no end of an epoch: evaluated here, the resumed run would differ from one without a stop."""
        if self.was_stopped:
            control.should_save = not self.stopped_within_epoch
            control.should_evaluate &= not self.stopped_within_epoch

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Report the metrics, and whether they are the best so far."""
        if (value := metrics.get(f"eval_{args.metric_for_best_model}")) is not None:
            best = state.best_metric
            is_best = best is None or (value > best if args.greater_is_better else value < best)
            named = {name[5:]: number for name, number in metrics.items() if name.startswith("eval_")}
            self._report(state, named, is_best)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Be silent in the evaluations of the finished model."""
        self.on_progress = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint, when every process has written its part."""
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def _report(self, state: Any, metrics: dict[str, float] | None = None, is_best: bool = False) -> None:
        if self.on_progress is not None and state.is_world_process_zero:
            steps = state.global_step - self.first_step
            pace = (time.monotonic() - self.started) / steps if steps else None
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            progress = Progress(state.global_step, state.max_steps, steps, loss, pace, memory(), metrics, is_best)
            self.on_progress(progress)


def _anywhere(wanted: bool, device: torch.device) -> bool:
    """Whether it is true on any process: all have to stop after the same step."""
    if not dist.is_initialized():
        return wanted
    flag = torch.tensor(float(wanted), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def memory() -> int:
    """Bytes that this process has held at most; on a GPU what torch has."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
