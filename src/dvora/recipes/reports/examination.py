"""The doctor on folders: a run with its own rows, or an adapter on its base with random inputs."""

from collections.abc import Sequence
from pathlib import Path

from ...tools.doctor import Examination, examine
from ..data.run_data import labelled_examples
from ..models.adapters import load_adapted, read_adapter
from ..models.hub import offline
from ..models.inputs import example_inputs
from ..run_folder import RECORD, read_run
from ..settings import NOTHING, Trust
from .evaluation import unchanged_data
from .run_model import Rows, RunModel

TOKENS = 16
EXAMINED = 8
"""Rows of the batch that checks use."""


def examine_folder(
    folder: Path,
    model: str | None = None,
    files: Sequence[str] = (),
    rows: int = EXAMINED,
    layers: int | None = None,
    trust: Trust = NOTHING,
) -> Examination:
    """Examine an adapter on its base.

    Args:
        folder: of a run of `dvora train`, or of an adapter of PEFT.
        model: the base of an adapter; None: the one that it names.
        files: with labelled rows for a run's model; none: rows that the run held out, or trained on.
        rows: of the batch that checks use.
        layers: checked one by one at most; None: all.
        trust: what is allowed to get the base.

    Raises:
        ValueError: the folder holds no adapter, it does not fit the base, or a file is not what the task needs.
    """
    if rows < 2:
        raise ValueError(f"rows is {rows}; the doctor compares rows of a batch, so it needs two or more")
    if (folder / RECORD).is_file():
        if model is not None:
            raise ValueError(f"{folder} is a run, whose base is on record; leave --model out, or name its adapter")
        run = read_run(folder, trust)
        if run.settings.method in ("full", "head"):
            raise ValueError(f"{folder} was trained with the method {run.settings.method}, which makes no adapter")
        if files:
            labelled: Rows = [example.row for example in labelled_examples(files, run, {})]
        else:
            data = unchanged_data(run)
            labelled = data.test or data.train
        trained = RunModel(run)
        with offline():
            return examine(trained.model, trained.batch(labelled[:rows]), layers=layers)
    if files:
        raise ValueError(f"{folder} is no run, so it is not known how to read {files[0]}; leave the data out")
    adapter = read_adapter(folder)
    adapted = load_adapted(adapter, model, trust)
    with offline():
        return examine(adapted, example_inputs(adapted.get_base_model(), rows, TOKENS), layers=layers)
