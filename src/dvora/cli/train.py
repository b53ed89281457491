"""`dvora train`: from data and a model to a trained one in a folder of its own."""

import gc
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes.settings import Settings, Trust, commented, read_settings
from .errors import INTERRUPTED
from .options import OwnCode, command, with_options_of
from .output import Output, print_line, results
from .progress import training

EXAMPLE: dict[str, Any] = {"task": "text-classification", "model": "path/to/model", "data": ["reviews.csv"]}
"""What --print-config shows of the keys that have no default."""


@command
@with_options_of(Settings, {"model": "-m", "output": "-o"})
def train(
    shown: Output,
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of settings, or the folder of a run; options override it.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings, explained, and train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    own_code: OwnCode = False,
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
    options = {key: value for key, value in settings.items() if value is not None}
    if config is not None and config.is_dir():
        config /= "config.yaml"
    if config is not None and not config.exists():
        raise ValueError(f"{config}: no such file; --print-config writes one")
    if print_config:
        # A file has what it has; without one the keys that must be set get an example.
        typer.echo(
            commented(read_settings(config, options if config else {**EXAMPLE, **options})), file=results(), nl=False
        )
        return
    chosen = read_settings(config, options)
    if "output" not in options:
        chosen = _placed(chosen, config, resume)
    _run(chosen, resume, shown, Trust(own_code, download=True))


def _placed(settings: Settings, config: Path | None, resume: bool) -> Settings:
    """The settings, their output checked: the configuration of a run names the folder that the run was in.

    Raises:
        ValueError: a run's configuration names another folder than the run's.
    """
    from ..recipes.run_folder import RECORD

    default = Path(settings.output)
    if "output" not in settings.model_fields_set and default.is_symlink():
        raise ValueError(f"{default} is a link; name the folder of the run with --output")
    folder = None if config is None else config.parent
    if folder is None or not (folder / RECORD).exists() or default.resolve() == folder.resolve():
        return settings
    if resume:
        return settings.model_copy(update={"output": str(folder)})
    raise ValueError(
        f"{folder} is a run that was in {default} when it was made; name the folder of the new one with --output"
    )


def _run(settings: Settings, resume: bool, shown: Output, trust: Trust) -> None:
    from ..recipes.data.run_data import load_data
    from ..recipes.models.hub import check_model
    from ..recipes.run_folder import entered, is_first

    with entered(settings, resume) as place:
        data = None
        if place.record is None or place.record["state"] != "finished":
            check_model(place.settings.model, trust)
            data = load_data(place.settings)
        # After all that can be wrong without it: libraries of models take seconds.
        from ..recipes.training.run import train_in

        note = shown.note if is_first() else lambda _: None
        with training(shown.quiet) as on_progress:
            outcome = train_in(place, on_progress, note, trust, data)
    _leave_group()
    if not is_first():
        return
    if outcome.run is None:
        again = shlex.join(["dvora", "train", str(Path(settings.output) / "config.yaml"), "--resume"])
        print_line(f"stopped after step {outcome.stopped_at}; go on with: {again}")
        raise typer.Exit(INTERRUPTED)
    record, folder, here = outcome.run.record, outcome.run.folder, Path.cwd()
    shown.result(
        _result(record, outcome.run.folder, outcome.run.adapter, shown.as_json),
        title=f"{settings.method} on {settings.task}",
        verdict="\n".join(record.get("verdict", [])),
    )
    # As somebody would type it here.
    near = folder.is_relative_to(here) and folder != here
    shown.next_step(
        "dvora", "report", str(folder.relative_to(here) if near else folder), why="a page with curves and examples"
    )


def _leave_group() -> None:
    """Leave the group of processes while Python is whole: gloo's threads let go of tensors, and abort what ends."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        # The wrapped model, in a cycle with its trainer, holds the group, and with it the threads.
        gc.collect()
        dist.destroy_process_group()


def _result(record: Any, folder: Path, adapter: Path, as_json: bool) -> dict[str, Any]:
    from ..recipes.tasks.metrics import metric_rows
    from ..recipes.tasks.task import Truncation

    parts = record.get("truncation", {})
    cut = sum((Truncation(**part) for part in parts.values()), Truncation()).sentence(record.get("max_length", 0))
    return {
        "run": str(folder),
        "adapter": str(adapter),
        "trained_parameters": record["trained_parameters"],
        **({"saved": record["saved"]} if "saved" in record else {}),
        "best_step": record["best_step"],
        "steps": record["steps"],
        "seconds": round(record["seconds"], 1),
        "rows": record["data"]["rows"],
        **({"truncation": parts} if as_json else {"cut": cut} if cut else {}),
        **({"calibration": record["calibration"]} if as_json and "calibration" in record else {}),
        "metrics": metric_rows(record["metrics"]),
        **({key: record[key] for key in ("comparisons", "verdict") if as_json and key in record}),
    }
