"""dvora train: from data and a model to a trained one in a folder of its own."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import INTERRUPTED, UsageError, one_line
from .output import Debug, Json, Output, OwnCode, Quiet, results, tell
from .progress import shown_progress

if TYPE_CHECKING:
    from ..recipes.run_folder import Run
    from ..recipes.settings import Settings

_DATA, _METHOD, _TRAINING = "The data", "The method", "Training"
EXAMPLE: dict[str, Any] = {"task": "text-classification", "model": "path/to/model", "data": ["reviews.csv"]}
"""What --print-config shows of the keys that have no default."""


def _flag(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of settings, or a run's folder; flags override it.")
    ] = None,
    task: Annotated[
        str | None,
        _flag("text-classification, regression, sentence-pairs, image-classification or causal-lm.", _DATA),
    ] = None,
    model: Annotated[str | None, _flag("The base: a folder, or a name on the hub.", _DATA, "--model", "-m")] = None,
    data: Annotated[
        list[str] | None, _flag("A file (csv, tsv, jsonl, json, parquet, txt) or image folder; may be repeated.", _DATA)
    ] = None,
    output: Annotated[str | None, _flag("The run's folder, dvora-run if not given.", _DATA, "--output", "-o")] = None,
    text_column: Annotated[str | None, _flag("Column of the text; else guessed.", _DATA)] = None,
    second_text_column: Annotated[str | None, _flag("Column of a pair's second text; else guessed.", _DATA)] = None,
    label_column: Annotated[str | None, _flag("Column of the class or number; else guessed.", _DATA)] = None,
    validation_share: Annotated[float | None, _flag("Held out to choose the best step (0.1).", _DATA)] = None,
    test_share: Annotated[float | None, _flag("Held out to the end (0.1).", _DATA)] = None,
    max_length: Annotated[int | None, _flag("Tokens at which a text is cut.", _DATA)] = None,
    method: Annotated[str | None, _flag("dvora (the default), vera, lora, dora, full or head.", _METHOD)] = None,
    rank: Annotated[int | None, _flag("Rank of the update.", _METHOD)] = None,
    targets: Annotated[str | None, _flag("Layers to adapt: all-linear, or an expression.", _METHOD)] = None,
    learning_rate: Annotated[float | None, _flag("Else by method.", _TRAINING)] = None,
    epochs: Annotated[float | None, _flag("Times that the data is read (3).", _TRAINING)] = None,
    max_steps: Annotated[int | None, _flag("Steps, in place of epochs.", _TRAINING)] = None,
    batch_size: Annotated[int | None, _flag("Rows of a batch (16).", _TRAINING)] = None,
    accumulation: Annotated[int | None, _flag("Batches of a step (1).", _TRAINING)] = None,
    mixed_precision: Annotated[str | None, _flag("no, bf16 or fp16.", _TRAINING)] = None,
    gradient_checkpointing: Annotated[bool | None, _flag("Spend time to save memory.", _TRAINING)] = None,
    evaluate_every: Annotated[int | None, _flag("Steps between evaluations; else an epoch.", _TRAINING)] = None,
    early_stopping: Annotated[int | None, _flag("Evaluations without a better one to stop after.", _TRAINING)] = None,
    seed: Annotated[int | None, _flag("Of new layers, order and dropout (0).", _TRAINING)] = None,
    tensorboard: Annotated[bool | None, _flag("Write logs for TensorBoard.", _TRAINING)] = None,
    settings: Annotated[
        list[str] | None, _flag("Any key of --print-config, as KEY=VALUE; may be repeated.", _TRAINING, "--set")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings, explained.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    own_code: OwnCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model: hold rows out, train, keep the best step, and judge it beside the simplest guess.

    The output folder gets the adapter, config.yaml (repeats the run) and run.json (versions, data hashes, metrics).
    Ctrl-C stops with a checkpoint, from which --resume goes on.

    Examples:

    \b
    dvora train --task text-classification --model minilm --data reviews.csv
    dvora train --task causal-lm -m smollm2 --data play.txt -o runs/play
    dvora train --task regression --print-config > config.yaml
    dvora train dvora-run/config.yaml --method lora -o runs/lora
    dvora train dvora-run/config.yaml --set weight_decay=0.01 -o runs/decay
    dvora train runs/play/config.yaml --resume
    """
    flags = {
        "task": task,
        "model": model,
        "data": data,
        "output": output,
        "text_column": text_column,
        "second_text_column": second_text_column,
        "label_column": label_column,
        "validation_share": validation_share,
        "test_share": test_share,
        "max_length": max_length,
        "method": method,
        "rank": rank,
        "targets": targets,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "mixed_precision": mixed_precision,
        "gradient_checkpointing": gradient_checkpointing,
        "evaluate_every": evaluate_every,
        "early_stopping": early_stopping,
        "seed": seed,
        "tensorboard": tensorboard,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    with one_line(debug):
        if print_config:
            _print_config(config, given, settings or [])
            return
        chosen = _placed(_settings(config, given, settings or []), config, output, resume)
        _run(chosen, resume, Output(as_json, quiet), quiet, own_code)


def _settings(config: Path | None, flags: dict[str, Any], pairs: list[str]) -> "Settings":
    from ..recipes.settings import read_settings

    if config is not None and config.is_dir():
        config /= "config.yaml"
    try:
        return read_settings(config, {**flags, **_parsed(pairs)})
    except ValueError as error:
        raise UsageError(f"{error}") from None
    except FileNotFoundError:
        raise UsageError(f"{config}: no such file; --print-config writes one") from None


def _placed(settings: "Settings", config: Path | None, output: str | None, resume: bool) -> "Settings":
    """The settings with an output that nobody but the caller has named; a run's configuration says where the run lay.

    Raises:
        UsageError: a run's configuration names another folder than the run's.
    """
    from ..recipes.run_folder import RECORD

    default = Path(settings.output)
    if output is not None:
        return settings
    if "output" not in settings.model_fields_set and default.is_symlink():
        raise UsageError(f"{default} is a link; name the folder of the run with --output")
    folder = None if config is None else config if config.is_dir() else config.parent
    if folder is None or not (folder / RECORD).exists() or default.resolve() == folder.resolve():
        return settings
    if resume:
        return settings.model_copy(update={"output": str(folder)})
    raise UsageError(
        f"{folder} is a run that lay in {default} when it was made; say with --output where the new one goes"
    )


def _parsed(pairs: list[str]) -> dict[str, Any]:
    from ..recipes.settings import parsed_yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: expected KEY=VALUE")
        try:
            found[key.strip()] = parsed_yaml(value)
        except ValueError as error:
            raise UsageError(f"--set {pair}: the value is not YAML: {error}") from None
    return found


def _print_config(config: Path | None, flags: dict[str, Any], pairs: list[str]) -> None:
    from ..recipes.settings import commented

    # A file has what it has; without one the keys that must be set get an example.
    example = EXAMPLE if config is None else {}
    typer.echo(commented(_settings(config, {**example, **flags}, pairs)), file=results(), nl=False)


def _run(settings: "Settings", resume: bool, output: Output, quiet: bool, own_code: bool) -> None:
    from ..recipes.models.hub import Trust
    from ..recipes.run_folder import is_first
    from ..recipes.training.run import InputError
    from ..recipes.training.run import train as train_recipe

    try:
        with shown_progress(quiet) as progress:
            outcome = train_recipe(
                settings, resume, progress, output.note if is_first() else None, Trust(own_code, download=True)
            )
    except InputError as error:
        raise UsageError(str(error)) from error
    if not is_first():
        return
    if outcome.run is None:
        again = shlex.join(["dvora", "train", str(Path(settings.output) / "config.yaml"), "--resume"])
        tell(f"stopped after step {outcome.stopped_at}; go on with: {again}")
        raise typer.Exit(INTERRUPTED)
    output.result(_shown(outcome.run), title=f"{settings.method} on {settings.task}")


def _shown(run: "Run") -> dict[str, Any]:
    record = run.record
    return {
        "run": str(run.folder),
        "adapter": str(run.adapter),
        "trained_values": record["trained_values"],
        "best_step": record["best_step"],
        "steps": record["steps"],
        "seconds": round(record["seconds"], 1),
        "rows": record["data"]["rows"],
        "metrics": metric_rows(record["metrics"]),
    }


def metric_rows(metrics: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of a run as rows with the same columns, the simplest guess below what was trained."""
    names = {name: None for values in metrics.values() for name in values if name != "guess"}
    rows = []
    for key, values in metrics.items():
        part, _, compared = key.partition("_")
        model = {"": "trained", "before_training": "before training"}.get(compared) or f"always {values.get('guess')}"
        rows.append({"part": part, "model": model, **{name: values.get(name) for name in names}})
    return rows
