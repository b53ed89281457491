"""Files that a run was not trained on, read as it read its own."""

from collections.abc import Mapping, Sequence

from ..run_folder import Run
from ..settings import Settings
from .examples import Examples, read_examples
from .run_data import encode_labels

COLUMNS = {"text_column": "text", "second_text_column": "text2", "label_column": "label"}
"""Settings, and what a run's record calls their columns."""


def reading_settings(run: Run, columns: Mapping[str, str | None]) -> Settings:
    """The settings with which a run reads other files.

    Args:
        run: finished.
        columns: names by `text_column`, `second_text_column` and `label_column`; those that are None or missing are as
            in the run's own files.
    """
    recorded: Mapping[str, str] = run.record["data"]["columns"]
    chosen = {key: columns.get(key) or recorded.get(kind) for key, kind in COLUMNS.items()}
    return run.settings.model_copy(update=chosen)


def labelled_examples(paths: Sequence[str], run: Run, columns: Mapping[str, str | None]) -> Examples:
    """The examples in some files, their labels as the run's model tells them.

    Raises:
        ValueError: a file or a row is not what the task needs, or a label is none of the run's.
    """
    examples = read_examples(paths, reading_settings(run, columns))
    if run.settings.task != "causal-lm":
        encode_labels(examples, run.labels)
    return examples
