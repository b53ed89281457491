"""Data, models and names that are not what they should be, and names and texts that only look odd."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hardening.errors import TRAIN, assert_fails
from tests.hardening.forks import Forks


def rows(desk: Path) -> list[list[str]]:
    with (desk / "reviews.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def write(desk: Path, table: list[list[str]], encoding: str = "utf-8", end: str = "\n", name: str = "") -> None:
    with (desk / (name or "reviews.csv")).open("w", newline="", encoding=encoding) as file:
        csv.writer(file, lineterminator=end).writerows(table)


def lines(change: Callable[[list[list[str]]], None]) -> Callable[[Path], None]:
    """Changes the rows of the reviews."""

    def changed(desk: Path) -> None:
        table = rows(desk)
        change(table)
        write(desk, table)

    return changed


def cut(name: str, length: int) -> Callable[[Path], None]:
    def changed(desk: Path) -> None:
        (desk / name).write_bytes((desk / name).read_bytes()[:length])

    return changed


def content(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda desk: (desk / name).write_bytes(text) and None


def without(*patterns: str) -> Callable[[Path], None]:
    def changed(desk: Path) -> None:
        for pattern in patterns:
            for path in desk.glob(pattern):
                path.unlink()

    return changed


def unlabelled(table: list[list[str]]) -> None:
    for row in table[3:10]:
        row[1] = ""


def one_class(table: list[list[str]]) -> None:
    for row in table[1:]:
        row[1] = "good"


def nothing(_: Path) -> None:
    pass


WRONG: dict[str, tuple[Callable[[Path], None], str, int, str]] = {
    "missing labels": (lines(unlabelled), TRAIN, 2, "no label in line 4, line 5, line 6, line 7, line 8 and 2 more"),
    "a single class": (lines(one_class), TRAIN, 2, "the single class 'good'; there is nothing to predict"),
    "no text": (lines(lambda table: table[5].__setitem__(0, " ")), TRAIN, 2, "line 6: column 'text' has no text"),
    "a field too many": (lines(lambda table: table[5].append("x")), TRAIN, 2, "has to be in double quotes"),
    "an open quote": (content("reviews.csv", b'text,label\n"open,good\n'), TRAIN, 2, "double quote left open"),
    "an empty file": (content("reviews.csv", b""), TRAIN, 2, "reviews.csv is empty"),
    "only a header": (content("reviews.csv", b"text,label\n"), TRAIN, 2, "reviews.csv has no rows"),
    "no text file": (content("reviews.csv", b"PK\x03\x04\0\0\0"), TRAIN, 2, "is no text"),
    "too few rows": (lines(lambda table: table.__delitem__(slice(4, None))), TRAIN, 2, "add data"),
    "no such column": (nothing, f"{TRAIN} --label-column lable", 2, "did you mean 'label'"),
    "no file": (nothing, f"{TRAIN} --data no.csv", 2, "no.csv: no such file or folder"),
    "a folder": (nothing, f"{TRAIN} --data base", 2, "is a folder; give files"),
    "an unknown suffix": (lambda desk: shutil.copy(desk / "reviews.csv", desk / "a.cvs") and None,
                          f"{TRAIN} --data a.cvs", 2, "did you mean '.csv'"),
    "an unknown encoding": (nothing, f"{TRAIN} --encoding utf-9", 2, "encoding 'utf-9' is unknown"),
    "another encoding": (content("reviews.csv", "text,label\nä,b\n".encode("latin-1")), f"{TRAIN} --encoding utf-8",
                         2, "line 2: not utf-8"),
    "damaged parquet": (content("a.parquet", b"PAR1 no"), f"{TRAIN} --data a.parquet", 2, "not a parquet file"),
    "damaged jsonl": (content("a.jsonl", b'{"text": "a", "label": 1}\n{'), f"{TRAIN} --data a.jsonl", 2, "line 2: not"),
    "no tokenizer": (without("base/token*"), TRAIN, 2, "holds no tokenizer"),
    "no weights": (without("base/model*"), TRAIN, 2, "holds no safetensors weights"),
    "no model": (without("base/config.json"), TRAIN, 2, "holds no config.json, so it is no model folder"),
    "an adapter as model": (nothing, f"{TRAIN} -m adapter", 2, "holds an adapter, not a model; name its base"),
    "a file as model": (nothing, f"{TRAIN} -m reviews.csv", 2, "reviews.csv is a file; a model is a folder"),
    "a damaged configuration": (content("base/config.json", b"{"), TRAIN, 2, "is not a valid JSON file"),
    "a configuration of nothing": (content("base/config.json", b"{}"), TRAIN, 2, "Unrecognized model"),
    "weights cut short": (cut("base/model.safetensors", 3000), TRAIN, 2, "are damaged"),
    "weights cut, merged": (cut("base/model.safetensors", 3000), "merge adapter --model base -o out", 1, "are da"),
    "an adapter cut short": (cut("adapter/adapter_model.safetensors", 500), "inspect adapter", 1, "cannot be read"),
    "adapter settings cut short": (cut("adapter/adapter_config.json", 99), "merge adapter -o out", 1, "is damaged"),
    "another base": (nothing, "merge adapter --model language -o out", 1, ""),
    "a name on the hub": (nothing, f"{TRAIN} -m nobody/nothing", 2, "the hub cannot be reached"),
    "a name on the hub, counted": (nothing, "count nobody/nothing", 1, "give a folder, or set HF_HUB_OFFLINE=1"),
    "a name on the hub, merged": (nothing, "merge adapter --model nobody/nothing -o out", 1, "hub cannot be reached"),
    "a folder that is full": (nothing, f"{TRAIN} -o base", 2, "is not empty (it holds"),
    "a file as output": (nothing, f"{TRAIN} -o reviews.csv", 1, "reviews.csv"),
    "a file as output, merged": (nothing, "merge adapter -o reviews.csv", 1, "is not an empty folder"),
    "below a file": (nothing, "merge adapter -o reviews.csv/out", 1, "reviews.csv"),
    "mixed precision": (nothing, f"{TRAIN} --mixed-precision fp16", 2, "fp16 needs a GPU"),
    "a typing error": (nothing, "trian", 2, "Did you mean 'train'; dvora --help"),
    "an option misspelled": (nothing, "merge adapter --ouput x", 2, "--output"),
    "no number": (nothing, f"{TRAIN} --rank x", 2, "'--rank'"),
    "an argument missing": (nothing, "inspect", 2, "Missing argument"),
    "a value missing": (nothing, "merge adapter -o", 2, "'-o' requires an argument"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_reported_in_one_line(forks: Forks, desk: Path, name: str) -> None:
    change, command, code, message = WRONG[name]
    change(desk)
    if command.endswith((" -o", "inspect")):
        before = sorted(desk.iterdir())
        ended = forks.run(desk, *command.split())
        assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (code, "", 1), ended
        assert message in ended.stderr
        assert sorted(desk.iterdir()) == before
        return
    assert_fails(forks, desk, command.split(), code, message)


def bom(desk: Path) -> None:
    write(desk, rows(desk), "utf-8-sig")


def latin(desk: Path) -> None:
    write(desk, [[text.replace("awful", "fürchterlich"), label] for text, label in rows(desk)], "latin-1")


def utf_16(desk: Path) -> None:
    write(desk, rows(desk), "utf-16")


def windows(desk: Path) -> None:
    write(desk, rows(desk), end="\r\n")


def huge(desk: Path) -> None:
    table = rows(desk)
    table[1][0] += " good" * 500_000
    write(desk, table)


def odd_names(desk: Path) -> None:
    """They are all in one folder, which is given on the command line."""
    folder = desk / "my dësk 文 'q'"
    folder.mkdir()
    shutil.copytree(desk / "base", folder / "base")
    shutil.copy(desk / "reviews.csv", folder)


@pytest.fixture(scope="module")
def plain(forks: Forks, made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What training on the file as it is gives."""
    desk = Path(shutil.copytree(made, tmp_path_factory.mktemp("plain") / "desk"))
    found: dict[str, object] = json.loads(forks.run(desk, *TRAIN.split(), "--json").stdout)
    return found


@pytest.mark.parametrize("change", [bom, latin, utf_16, windows, huge], ids=lambda change: change.__name__)
def test_files_of_every_system_are_read(
    forks: Forks, desk: Path, plain: dict[str, object], change: Callable[[Path], None]
) -> None:
    change(desk)
    ended = forks.run(desk, *TRAIN.split(), "--json")
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["rows"] == plain["rows"]
    if change in (bom, utf_16, windows):
        assert found["metrics"] == plain["metrics"]


def test_names_with_spaces_quotes_and_other_alphabets(forks: Forks, desk: Path) -> None:
    odd_names(desk)
    folder = "my dësk 文 'q'"
    given = ["-m", f"{folder}/base", "--data", f"{folder}/reviews.csv", "-o", f"{folder}/run 1"]
    commands = [
        [*TRAIN.split()[:3], *given, "--rank", "4", "--cpu", "--epochs", "1"],
        ["inspect", f"{folder}/run 1"],
        ["merge", f"{folder}/run 1", "-o", f"{folder}/mërged 1"],
        ["convert", f"{folder}/run 1", "--to", "dora", "-o", f"{folder}/as dora"],
        ["count", f"{folder}/base"],
        ["train", f"{folder}/run 1", "--resume"],
    ]
    for command in commands:
        ended = forks.run(desk, *command, "--json")
        assert ended.code == 0, (command, ended.stderr)
        assert isinstance(json.loads(ended.stdout), dict)
