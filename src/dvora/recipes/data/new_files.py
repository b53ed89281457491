"""Files that a run was not trained on: with labels to evaluate on, or rows, lines and images to predict for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..run_folder import Run
from ..settings import Settings
from .columns import KINDS, check_column
from .examples import Example, read_examples, row_of
from .images import image_key, images_in
from .run_data import encode_labels
from .tables import Note, stream_table


class Input(NamedTuple):
    """A row without its label: the values that were read, by column, and `text` (and `text2`) or `image` of them."""

    values: dict[str, Any]
    row: dict[str, Any]


def reading_settings(run: Run, columns: Mapping[str, str | None]) -> Settings:
    """The settings with which a run reads other files.

    Args:
        run: finished.
        columns: names by `text_column`, `second_text_column` and `label_column`; those that are None or missing are as
            in the run's own files.
    """
    recorded: Mapping[str, str] = run.record["data"]["columns"]
    return run.settings.model_copy(update={key: columns.get(key) or recorded.get(kind) for key, kind in KINDS.items()})


def labelled_examples(
    paths: Sequence[str], run: Run, columns: Mapping[str, str | None], note: Note = lambda _: None
) -> list[Example]:
    """The examples in some files, their labels as the run's model predicts them; `note` is called with assumptions.

    Raises:
        ValueError: a file or a row is not what the task needs, or a label is none of the run's.
    """
    examples, _ = read_examples(paths, reading_settings(run, columns), note)
    if run.settings.task != "causal-lm":
        encode_labels(examples, run.labels)
    return examples


def file_inputs(path: Path, settings: Settings, note: Note) -> Iterator[Input]:
    """The rows of a file: a table with at least the columns of the run's texts, or lines (.txt); images, or a folder.

    Args:
        path: of the file or folder.
        settings: see `reading_settings`.
        note: called with what was assumed.

    Raises:
        ValueError: it is not what the task needs; a mistake in a row is raised when the row is reached.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".txt":
        lines = stream_table(path, settings.encoding, note)
        yield from line_inputs(((place, row["text"]) for place, row in lines), settings)
    elif settings.task == "image-classification":
        yield from (_image(str(image)) for image in images_in(path))
    elif path.is_dir():
        raise ValueError(f"{path} is a folder; give a file (csv, tsv, jsonl, json, parquet, or txt with a text a line)")
    else:
        named = {key: name for key in ("text_column", "second_text_column") if (name := getattr(settings, key))}
        for number, (place, values) in enumerate(stream_table(path, settings.encoding, note)):
            for key, name in named.items() if not number else ():
                check_column(path, key, name, values)
            yield Input(values, row_of(values, {KINDS[key]: name for key, name in named.items()}, place)[0])


def line_inputs(lines: Iterable[tuple[str, str]], settings: Settings) -> Iterator[Input]:
    """A text, two texts with a tab between them, or the path of an image in each line; empty lines are passed over.

    Args:
        lines: each with its place.
        settings: with the names of the texts, see `reading_settings`.

    Raises:
        ValueError: a line is not what the task needs.
    """
    first, second = settings.text_column or "text", settings.second_text_column
    for place, line in lines:
        if not line.strip():
            continue
        if settings.task == "image-classification":
            yield _image(line.strip())
        elif second is None:
            yield Input({first: line}, {"text": line})
        else:
            texts = line.split("\t")
            if len(texts) != 2 or not all(text.strip() for text in texts):
                raise ValueError(f"{place}: expected two texts with a tab between them, found {len(texts)}")
            yield Input({first: texts[0], second: texts[1]}, {"text": texts[0], "text2": texts[1]})


def _image(path: str) -> Input:
    image_key(Path(path))
    return Input({"image": path}, {"image": path})
