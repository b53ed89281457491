"""Users' files, read with care: bounded, regular, and no links where a command writes."""

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from ..text import did_you_mean

LARGEST_RECORD = 2**28
"""Bytes of a record; one that notes a loss at each of a million steps has a quarter of them."""
Model = TypeVar("Model", bound=BaseModel)


def typed(path: Path) -> Path:
    """Where to write a path that the user typed: where it is a link, to its target.

    Links under names that a command chooses itself are never followed.
    """
    return path.resolve() if path.is_symlink() else path


def check_no_device(path: Path) -> None:
    """Refuse a pipe or a device, which a reader waits for, or reads without an end.

    Raises:
        ValueError: it is one.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device; only files and folders are read")


def check_readable(paths: Iterable[Path]) -> None:
    """Raise what keeps files from being read: libraries report files without permission as missing.

    Raises:
        OSError: the first file's.
        ValueError: one is a pipe or a device.
    """
    for path in paths:
        check_no_device(path)
        path.open("rb").close()


def check_no_links(folder: Path, inner: Callable[[str], bool]) -> None:
    """Refuse links, pipes and devices in a folder that a command writes to and removes things from.

    Args:
        folder: of the command's results.
        inner: whether the folder in it of that name is looked through as well.

    Raises:
        ValueError: there is one, which no command made.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(
                f"{path} is a link, a pipe or a device, which no command makes in such a folder; remove it, or choose "
                "another folder"
            )
        if inner(path.name):
            check_no_links(path, lambda _: True)


def read_bounded(path: Path, at_most: int = LARGEST_RECORD) -> bytes:
    """The content of a file of settings, or of a record.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, or larger than that.
    """
    check_no_device(path)
    if path.stat().st_size > at_most:
        raise ValueError(f"{path} is larger than the {at_most:,} bytes that such a file may have")
    return path.read_bytes()


def read_small(path: Path, at_most: int = LARGEST_RECORD) -> str:
    """Its text, see `read_bounded`.

    Raises:
        OSError, ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_bounded(path, at_most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_json(path: Path, at_most: int = LARGEST_RECORD, kind: type[BaseModel] | None = None) -> dict[str, Any]:
    """The names and values of a JSON file that is one object, see `parsed_json`.

    Raises:
        OSError, ValueError: it cannot be read, is damaged, or something else.
    """
    return parsed_json(read_bounded(path, at_most), path, kind)


def parsed_json(content: bytes, path: Path, kind: type[BaseModel] | None = None) -> dict[str, Any]:
    """The names and values in the content of a JSON file, as they stand there.

    Args:
        content: one object.
        path: of the file, for errors.
        kind: what it has to be.

    Raises:
        ValueError: it is damaged, or something else.
    """
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it is no table of settings")
    if kind is not None:
        checked(kind, values, f"{path} is damaged: ")
    return values


def checked(model: type[Model], values: Mapping[str, Any], before: str = "") -> Model:
    """A model of these values.

    Args:
        model: of pydantic.
        values: of its fields.
        before: where they stand, for the error.

    Raises:
        ValueError: in one line, what is wrong with which of them.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_problem(cast(dict[str, Any], problem), model) for problem in error.errors()]
        raise ValueError(f"{before}{'; '.join(dict.fromkeys(problems))}") from None


def _problem(problem: dict[str, Any], model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part not in ("str", "tuple[str, ...]", "[key]"))
    # What stands there may be large.
    message, value = str(problem["msg"]).removeprefix("Value error, "), reprlib.repr(problem["input"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}, {did_you_mean(key, model.model_fields)}"
    if problem["type"] == "missing":
        meaning = model.model_fields[key].description if key in model.model_fields else None
        return f"{key} is missing" + (f": {meaning}" if meaning else "")
    if not key:
        return message
    if problem["type"] == "literal_error":
        expected = re.findall("'(.*?)'", problem["ctx"]["expected"])
        return f"{key} is {value}, {did_you_mean(str(problem['input']), expected)}"
    return f"{key} is {value}: {message[0].lower()}{' '.join(message[1:].split())}"


class _WithoutAliases(yaml.SafeLoader):  # type: ignore[misc]
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise ValueError(f"line {alias.start_mark.line + 1} repeats *{alias.anchor}; write it out")
        return super().compose_node(parent, index)


def parsed_yaml(text: str) -> Any:
    """The value of a text in YAML.

    Raises:
        ValueError: it is not YAML, is nested too deeply, or has aliases (`*name`), with which ten lines can stand for
            ten thousand million.
    """
    try:
        return yaml.load(text, _WithoutAliases)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from None
