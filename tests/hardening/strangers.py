"""Folders and files as somebody might send them who means no good; made by code, each from what is on the desk."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SOON, MEMORY = 20.0, 2**30
"""Seconds after which a command counts as hanging, and bytes that it may need beyond the warm process's."""
CLASSIFIER = "base_model.model.classifier.weight"


class Case(NamedTuple):
    """A hostile thing.

    Args:
        change: puts it on the desk, where a run lies in "run", an adapter in "adapter", the base of both in "base".
        command: that meets it.
        message: in its error.
    """

    change: Callable[[Path], object]
    command: str
    message: str


def settings(path: Path, **changes: Any) -> None:
    """Change names of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def of_run(**changes: Any) -> Callable[[Path], None]:
    """Change the settings in a run's record."""

    def change(desk: Path) -> None:
        record = desk / "run" / "run.json"
        settings(record, settings={**json.loads(record.read_text())["settings"], **changes})

    return change


def recorded(**changes: Any) -> Callable[[Path], None]:
    return lambda desk: settings(desk / "run" / "run.json", **changes)


def without(name: str, **changes: Any) -> Callable[[Path], None]:
    """Take a name out of a run's record."""

    def change(desk: Path) -> None:
        record = json.loads((desk / "run" / "run.json").read_text())
        del record[name]
        (desk / "run" / "run.json").write_text(json.dumps({**record, **changes}))

    return change


def of_adapter(**changes: Any) -> Callable[[Path], None]:
    return lambda desk: settings(desk / "adapter" / "adapter_config.json", **changes)


def of_base(**changes: Any) -> Callable[[Path], None]:
    return lambda desk: settings(desk / "base" / "config.json", **changes)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda desk: (desk / name).write_text(content)


def pipe(name: str) -> Callable[[Path], None]:
    """A pipe in a file's place: who opens it waits for ever."""

    def change(desk: Path) -> None:
        (desk / name).unlink(missing_ok=True)
        os.mkfifo(desk / name)

    return change


def endless(name: str) -> Callable[[Path], None]:
    """A file that never ends."""

    def change(desk: Path) -> None:
        (desk / name).unlink(missing_ok=True)
        (desk / name).symlink_to("/dev/zero")

    return change


def data(path: str) -> Callable[[Path], None]:
    """A run whose record names other data."""

    def change(desk: Path) -> None:
        name = str(desk / path) if not path.startswith("/") else path
        of_run(data=[name])(desk)
        record = json.loads((desk / "run" / "run.json").read_text())
        recorded(data={**record["data"], "files": {name: {"sha256": "0" * 64, "bytes": 2**40}}})(desk)

    return change


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(desk: Path) -> None:
        for each in changes:
            each(desk)

    return change


def empty_head(rows: int) -> Callable[[Path], None]:
    """A head of as many rows as one likes, in no bytes."""

    def change(desk: Path) -> None:
        file = desk / "adapter" / "adapter_model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        names = json.loads(content[8 : 8 + length])
        names[CLASSIFIER] = {"dtype": "F32", "shape": [rows, 0], "data_offsets": [0, 0]}
        header = json.dumps(names).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        of_adapter(task_type="SEQ_CLS", modules_to_save=["classifier"])(desk)

    return change


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda desk: (desk / name).write_bytes((desk / name).read_bytes()[:length])


def nested(depth: int, inside: str = "") -> str:
    return "[" * depth + inside + "]" * depth


def laughs() -> str:
    """Ten million million settings in ten lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    return "\n".join(lines)


TRAIN = "train --task text-classification -m base -o out --rank 4 --cpu"
WIDE = ",".join(f"c{number}" for number in range(100_000))
DIGITS = "9" * 6000
CASES: dict[str, Case] = {
    "a head of no values": Case(empty_head(30_000_000), "merge adapter -o out", "holds no values"),
    "a head that is missing": Case(of_adapter(task_type="SEQ_CLS", modules_to_save=["classifier"]),
                                   "merge adapter -o out", "lacks the modules that the adapter trains whole"),
    "five million classes": Case(recorded(labels=[""] * 5_000_000), "predict run reviews.csv -o new.csv", "5,000,000"),
    "a method of no one": Case(of_adapter(peft_type="EVIL"), "inspect adapter", "'EVIL', which is no method of PEFT"),
    "no class of a model": Case(of_adapter(auto_mapping={"base_model_class": "Trainer"}), "merge adapter -o out",
                                "transformers' Trainer, which is no model"),
    "heads of numbers": Case(of_adapter(modules_to_save=[1]), "merge adapter -o out", "modules_to_save, got [1]"),
    "an expression without end": Case(of_adapter(peft_type="LORA", target_modules="(.+)+$x"), "merge adapter -o out",
                                      "could take more than"),
    "a module to import": Case(of_adapter(peft_type="LORA", megatron_config={"a": 1}, megatron_core="this"),
                               "merge adapter -o out", "'megatron_config', with which PEFT would load or import"),
    "adapters elsewhere": Case(of_adapter(peft_type="XLORA", adapters={"a": "nobody/nothing"}), "merge adapter -o out",
                               "'adapters', with which PEFT would load or import"),
    "an adapter cut short": Case(cut("adapter/adapter_model.safetensors", 500), "inspect adapter", "cannot be read"),
    "weights cut short": Case(cut("base/model.safetensors", 3000), "merge adapter --model base -o out", "are damaged"),
    "nested settings": Case(text("adapter/adapter_config.json", nested(100_000)), "inspect adapter", "too deeply"),
    "a nested model": Case(text("base/config.json", nested(100_000)), "count base", "too deeply"),
    "a number in a record": Case(text("run/run.json", f'{{"state": {DIGITS}}}'), "evaluate run", "4300 digits"),
    "repeated settings": Case(text("a.yaml", laughs()), "train a.yaml", "line 2 repeats *a; write it out"),
    "code of a configuration": Case(text("a.yaml", "task: regression\nmodel: base\ndata: x\ntrust_remote_code: true\n"),
                                    "train a.yaml", "--trust-remote-code"),
    "a pipe as record": Case(pipe("run/run.json"), "evaluate run", "not a regular file"),
    "a pipe as values": Case(pipe("adapter/adapter_model.safetensors"), "merge adapter -o out", "holds no adapter_mod"),
    "a pipe as model": Case(pipe("base/model.safetensors"), "merge adapter -o out", "is a pipe or a device"),
    "a pipe as data": Case(both(pipe("a.csv"), data("a.csv")), "evaluate run", "is a pipe or a device"),
    "endless data": Case(data("/dev/zero"), "evaluate run", "is a pipe or a device"),
    "other data": Case(data("base/model.safetensors"), "evaluate run", "has changed since"),
    "a base of another base": Case(text("base/adapter_config.json", '{"base_model_name_or_path": "nobody/nothing"}'),
                                   "merge adapter -o out", "holds an adapter beside the model"),
}  # fmt: skip
