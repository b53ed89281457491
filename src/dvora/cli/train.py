"""dvora train: from data and a model to a trained one in a folder of its own."""

import gc
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..recipes.settings import Settings, commented, read_settings
from .errors import INTERRUPTED, UsageError, check_there, one_line, wrong_input
from .options import with_options_of
from .output import Debug, Json, Output, OwnCode, Quiet, print_line, results
from .progress import shown_progress

if TYPE_CHECKING:
    from ..recipes.run_folder import Run

EXAMPLE: dict[str, Any] = {"task": "text-classification", "model": "path/to/model", "data": ["reviews.csv"]}
"""What --print-config shows of the keys that have no default."""
SHORT = {"model": "-m", "output": "-o"}


@with_options_of(Settings, SHORT)
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of settings, or the folder of a run; options override it.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings, explained, and train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    own_code: OwnCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Train a model: hold rows out, train, keep the best step, evaluate it beside simple baselines.

    The output folder gets the adapter, config.yaml (repeats the run) and run.json (versions, data hashes, metrics).
    Ctrl-C stops with a checkpoint, from which --resume goes on. Every key of --print-config is an option too.

    Examples:

    \b
    dvora train --task text-classification --model minilm --data reviews.csv
    dvora train --task causal-lm -m smollm2 --data play.txt -o runs/play
    dvora train --task regression --print-config > config.yaml
    dvora train dvora-run/config.yaml --method lora -o runs/lora
    dvora train dvora-run/config.yaml --weight-decay 0.01 -o runs/decay
    dvora train runs/play/config.yaml --resume
    """
    given = {key: value for key, value in settings.items() if value is not None}
    with one_line(debug):
        if print_config:
            # A file has what it has; without one the keys that must be set get an example.
            settings_shown = _settings(config, given if config else {**EXAMPLE, **given})
            typer.echo(commented(settings_shown), file=results(), nl=False)
            return
        chosen = _placed(_settings(config, given), config, resume, is_named="output" in given)
        _run(chosen, resume, Output(as_json, quiet), quiet, own_code)


def _settings(config: Path | None, given: dict[str, Any]) -> Settings:
    if config is not None and config.is_dir():
        config /= "config.yaml"
    try:
        return read_settings(config, given)
    except ValueError as error:
        raise UsageError(f"{error}") from None
    except FileNotFoundError:
        raise UsageError(f"{config}: no such file; --print-config writes one") from None


def _placed(settings: Settings, config: Path | None, resume: bool, is_named: bool) -> Settings:
    """The settings, their output checked: the configuration of a run names the folder that the run was in.

    Raises:
        UsageError: a run's configuration names another folder than the run's.
    """
    from ..recipes.run_folder import RECORD

    default = Path(settings.output)
    if is_named:
        return settings
    if "output" not in settings.model_fields_set and default.is_symlink():
        raise UsageError(f"{default} is a link; name the folder of the run with --output")
    folder = None if config is None else config if config.is_dir() else config.parent
    if folder is None or not (folder / RECORD).exists() or default.resolve() == folder.resolve():
        return settings
    if resume:
        return settings.model_copy(update={"output": str(folder)})
    raise UsageError(
        f"{folder} is a run that was in {default} when it was made; name the folder of the new one with --output"
    )


def _run(settings: Settings, resume: bool, output: Output, quiet: bool, own_code: bool) -> None:
    from ..recipes.run_folder import check_resumable, is_first, read_record
    from ..recipes.settings import Trust, resolved

    folder = Path(settings.output)
    # Here before the imports, which take seconds, and in the recipe once more, when the folder is locked.
    with wrong_input():
        check_resumable(folder, read_record(folder), resolved(settings), resume)
    if not resume:
        # A name on the hub has one slash at most, and begins with neither of these.
        is_path = settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1
        check_there(*settings.all_data, settings.model if is_path else None)
    from ..recipes.training.run import InputError
    from ..recipes.training.run import train as train_recipe

    note = output.note if is_first() else lambda _: None
    try:
        with shown_progress(quiet) as on_progress:
            outcome = train_recipe(settings, resume, on_progress, note, Trust(own_code, download=True))
    except InputError as error:
        raise UsageError(str(error)) from error
    _leave_group()
    if not is_first():
        return
    if outcome.run is None:
        again = shlex.join(["dvora", "train", str(Path(settings.output) / "config.yaml"), "--resume"])
        print_line(f"stopped after step {outcome.stopped_at}; go on with: {again}")
        raise typer.Exit(INTERRUPTED)
    output.result(
        _shown(outcome.run, output.as_json),
        title=f"{settings.method} on {settings.task}",
        verdict="\n".join(outcome.run.record.get("verdict", [])),
    )
    output.next_step("dvora", "report", shown_path(outcome.run.folder), why="a page with curves and examples")


def _leave_group() -> None:
    """Leave the group of processes while Python is whole: gloo's threads let go of tensors, and abort what ends."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        # The wrapped model, in a cycle with its trainer, holds the group, and with it the threads.
        gc.collect()
        dist.destroy_process_group()


def shown_path(folder: Path) -> str:
    """A folder as somebody would type it here."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) and folder != here else str(folder)


def _shown(run: "Run", as_json: bool) -> dict[str, Any]:
    from ..recipes.tasks.metrics import metric_rows
    from ..recipes.tasks.task import Truncation

    record = run.record
    parts = record.get("truncation", {})
    cut = sum((Truncation(**part) for part in parts.values()), Truncation()).sentence(record.get("max_length", 0))
    return {
        "run": str(run.folder),
        "adapter": str(run.adapter),
        "trained_parameters": record["trained_parameters"],
        "best_step": record["best_step"],
        "steps": record["steps"],
        "seconds": round(record["seconds"], 1),
        "rows": record["data"]["rows"],
        **({"truncation": parts} if as_json else {"cut": cut} if cut else {}),
        "metrics": metric_rows(record["metrics"]),
        **({"verdict": record["verdict"]} if as_json and "verdict" in record else {}),
    }
