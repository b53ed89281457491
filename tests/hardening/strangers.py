"""Folders and files as somebody might send them who means no good; made by code, each from what is on the desk."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOON, MEMORY = 20.0, 2**30
"""Seconds after which a command counts as hanging, and bytes that it may need beyond the warm process's."""
CLASSIFIER = "base_model.model.classifier.weight"
THEIRS, MARK = "theirs", "made-by-code"
"""On the desk: a folder that no command has to do with, and a file that code of strangers makes when it is run."""


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
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def of_run(**changes: Any) -> Callable[[Path], None]:
    """Change the settings in a run's record."""

    def change(desk: Path) -> None:
        record = desk / "run" / "run.json"
        settings(record, settings={**json.loads(record.read_text())["settings"], **changes})

    return change


def recorded(**changes: Any) -> Callable[[Path], None]:
    return lambda desk: settings(desk / "run" / "run.json", **changes)


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


def with_code(desk: Path) -> None:
    """A base with code of its own."""
    kinds = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model", "AutoModel": "evil.Model"}
    of_base(model_type="evil", auto_map=kinds)(desk)
    (desk / "base" / "evil.py").write_text(
        f"open({str(desk / MARK)!r}, 'w').close()\nfrom transformers import BertConfig as Config\n"
        "from transformers import BertForSequenceClassification as Model\n"
    )


class Evil:
    """Makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.mark), "w")


def pickled(name: str, instead_of: str) -> Callable[[Path], None]:
    """An evil pickle in the place of a file."""

    def change(desk: Path) -> None:
        (desk / instead_of).unlink()
        torch.save({"weight": Evil(desk / MARK)}, desk / name)

    return change


def link(name: str, to: str = THEIRS) -> Callable[[Path], None]:
    """A link to what is somebody else's, in the place of a file or a folder."""

    def change(desk: Path) -> None:
        if (desk / name).is_dir():
            shutil.rmtree(desk / name)
        (desk / name).unlink(missing_ok=True)
        (desk / name).symlink_to(desk / to)

    return change


def linked_run(name: str, to: str = THEIRS, state: str = "started") -> Callable[[Path], None]:
    """A run that would go on through a link."""

    def change(desk: Path) -> None:
        recorded(state=state)(desk)
        shutil.copy(desk / "run" / "config.yaml", desk / "a.yaml")
        link(name, to)(desk)

    return change


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda desk: (desk / name).write_bytes((desk / name).read_bytes()[:length])


NESTED = "[" * 100_000 + "]" * 100_000


def laughs() -> str:
    """Ten million million settings in ten lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    return "\n".join(lines)


TRAIN = "train --task text-classification -m base --data reviews.csv -o out --rank 4 --cpu"
PREDICT, MERGE, GO_ON = "predict run reviews.csv -o new.csv", "merge adapter -o out", "train a.yaml --resume --quiet"
NOT_HERE = "'nobody/nothing' is no folder here and not in the hub's cache"
DIGITS = "9" * 6000
CASES: dict[str, Case] = {
    "a head of no values": Case(empty_head(30_000_000), MERGE, "holds no values"),
    "five million classes": Case(recorded(labels=[""] * 5_000_000), PREDICT, "5,000,000"),
    "a method of no one": Case(of_adapter(peft_type="EVIL"), "inspect adapter", "'EVIL', which is no method of PEFT"),
    "no class of a model": Case(of_adapter(auto_mapping={"base_model_class": "Trainer"}), MERGE,
                                "transformers' Trainer, which is no model"),
    "an expression without end": Case(of_adapter(peft_type="LORA", target_modules="(.+)+$x"), MERGE,
                                      "could take more than"),
    "a module to import": Case(of_adapter(peft_type="LORA", megatron_config={"a": 1}, megatron_core="this"),
                               MERGE, "'megatron_config', with which PEFT would load or import"),
    "adapters elsewhere": Case(of_adapter(peft_type="XLORA", adapters={"a": "nobody/nothing"}), MERGE,
                               "'adapters', with which PEFT would load or import"),
    "an adapter cut short": Case(cut("adapter/adapter_model.safetensors", 500), "inspect adapter", "cannot be read"),
    "weights cut short": Case(cut("base/model.safetensors", 3000), "merge adapter --model base -o out", "are damaged"),
    "nested settings": Case(text("adapter/adapter_config.json", NESTED), "inspect adapter", "too deeply"),
    "a number in a record": Case(text("run/run.json", f'{{"state": {DIGITS}}}'), "evaluate run", "4300 digits"),
    "repeated settings": Case(text("a.yaml", laughs()), "train a.yaml", "line 2 repeats *a; write it out"),
    "code of a configuration": Case(text("a.yaml", "task: regression\nmodel: base\ndata: x\ntrust_remote_code: true\n"),
                                    "train a.yaml", "unknown key 'trust_remote_code'"),
    "a pipe as record": Case(pipe("run/run.json"), "evaluate run", "is a pipe or a device"),
    "a pipe as values": Case(pipe("adapter/adapter_model.safetensors"), MERGE, "holds no adapter_mod"),
    "a pipe as data": Case(both(pipe("a.csv"), data("a.csv")), "evaluate run", "is a pipe or a device"),
    "endless data": Case(data("/dev/zero"), "evaluate run", "is a pipe or a device"),
    "other data": Case(data("base/model.safetensors"), "evaluate run", "has changed since"),
    "a base of another base": Case(text("base/adapter_config.json", '{"base_model_name_or_path": "nobody/nothing"}'),
                                   MERGE, "holds an adapter beside the model"),
    "code in a run's model": Case(with_code, PREDICT, "trust-remote-code"),
    "code in a base": Case(with_code, "merge adapter --model base -o out", "which is not run"),
    "a model elsewhere": Case(of_run(model="nobody/nothing"), PREDICT, NOT_HERE),
    "a base elsewhere": Case(of_adapter(base_model_name_or_path="nobody/nothing"), MERGE, NOT_HERE),
    "a pickled adapter": Case(pickled("adapter/adapter_model.bin", "adapter/adapter_model.safetensors"), MERGE,
                              "pickled adapter_model.bin"),
    "a pickled base": Case(pickled("base/pytorch_model.bin", "base/model.safetensors"),
                           "merge adapter --model base -o out", "no safetensors weights"),
    "linked checkpoints": Case(linked_run("run/checkpoints", state="finished"), GO_ON, "run/checkpoints is a link"),
    "a linked adapter": Case(linked_run("run/adapter"), GO_ON, "run/adapter is a link"),
    "a linked lock": Case(linked_run("run/.lock", f"{THEIRS}/letter"), GO_ON, "run/.lock is a link"),
    "a linked folder to make": Case(link("out"), MERGE, "out is a link"),
    "a secret beside an adapter": Case(link("adapter/tokenizer_extra.json", f"{THEIRS}/letter"), MERGE,
                                       "tokenizer_extra.json is a link out of its folder"),
}  # fmt: skip
