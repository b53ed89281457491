"""The data of a run: what is found in files, what is refused with its place, and that nothing leaks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dvora.recipes.data.run_data import Data, load_data
from dvora.recipes.data.splits import same_text
from dvora.recipes.settings import checked_settings
from tests.recipes import tiny_data


def load(data: Path | list[Path], task: str = "text-classification", **settings: Any) -> Data:
    paths = [str(path) for path in (data if isinstance(data, list) else [data])]
    return load_data(checked_settings({"task": task, "model": "m", "data": paths, **settings}, ""))


def csv(tmp_path: Path, *lines: str, name: str = "a.csv") -> Path:
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path / name


def test_a_labelled_csv(tmp_path: Path) -> None:
    path = tiny_data.reviews(tmp_path / "a b ü.csv", 100)
    found = load(path)
    assert found.labels == ("bad", "good")
    assert found.record["rows"] == {"train": 80, "validation": 10, "test": 10}
    assert found.record["files"][str(path)]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for part in (found.train, found.validation, found.test):
        assert sum(row["label"] for row in part) * 2 == len(part)
        assert all((row["label"] == 1) == (row["text"].split()[0] in tiny_data.OPINIONS["good"]) for row in part)
    counts = "classes, with their rows: good 50, bad 50"
    assert found.notes == ("text_column: text (guessed)", "label_column: label (guessed)", counts)
    assert load(path) == found
    assert load(path, split_seed=1).test != found.test


def test_duplicates_go_and_what_nearly_is_one_stays_in_one_part(tmp_path: Path) -> None:
    rows = [f"{text} {number},{number % 2}" for number in range(60) for text in ("A b", "a  B", "a b", "A b")]
    found = load(csv(tmp_path, "text,label", *rows, "a b 0,1"))
    assert "60 exact duplicates removed" in found.notes
    place = f"{tmp_path / 'a.csv'}, row"
    assert f"texts with different labels, 1: 'A b 0' ({place} 1: 0, {place} 241: 1)" in found.notes
    assert found.record["duplicates_removed"] == 60
    keys = [{same_text(row["text"]) for row in part} for part in (found.train, found.validation, found.test)]
    assert sum(map(len, keys)) == 60
    assert sum(map(len, (found.train, found.validation, found.test))) == 181


@pytest.mark.parametrize("part", ["validation", "test"])
def test_rows_of_held_out_files_are_in_no_other_part(tmp_path: Path, part: str) -> None:
    rows = [f"text {number},{number % 2}" for number in range(50)]
    train = csv(tmp_path, "text,label", *rows)
    held_out = csv(tmp_path, "text,label", *rows[:10], "TEXT 20,0", name="held-out.csv")
    found = load(train, **{f"{part}_data": str(held_out)})
    parts = [{same_text(row["text"]) for row in rows} for rows in (found.train, found.validation, found.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 50
    assert found.record["leaks_removed"] == 11
    assert "11 rows removed that also occur in a held-out file" in found.notes


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (["text,label", "a,1", "b,", "c, "], {}, "a.csv, row 2: column 'label' is empty; fill it in, or remove"),
        (["text,label", "a,1", ",2"], {}, "a.csv, row 2: column 'text' is empty"),
        (["text,label", "a,x", "b,x"], {}, "column 'label' has the single class 'x'"),
        (["text,label", *(f"a{n},b{n}" for n in range(50))], {}, "50 different labels in 50 rows"),
        (["text,label", "a,1", "b,2"], {}, "too few different rows for the part .*train 2, validation 0, test 0"),
        (
            ["txt,label", "a,1", "b,2"],
            {"text_column": "text"},
            "no column 'text'; set --text-column, did you mean 'txt'?",
        ),
        (["a,b,c", "a,1,2"], {}, "which column is the text_column. Set --text-column to one of a, b, c$"),
        (["text,label", "a,1", "b,2"], {"text_column": "label", "label_column": "label"}, "two columns have one name"),
        (["text,rating", "a,1", "b,good"], {"task": "regression"}, "row 2: the label 'good' is not a number"),
        (["text,rating", "a,1", "b,inf"], {"task": "regression"}, "row 2: the label 'inf' is not finite"),
        (
            ["text,rating", "a,1", "b,-1e30"],
            {"task": "regression"},
            "row 2: the label '-1e30' is beyond 1,000,000,000, too large to train with; divide the column",
        ),
    ],
)
def test_bad_data_is_reported_with_its_place(
    tmp_path: Path, lines: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(csv(tmp_path, *lines), **settings)
    assert "\n" not in str(error.value)


def test_a_column_is_found_by_its_name_or_because_it_is_the_only_one_left(tmp_path: Path) -> None:
    rows = [f"{number % 2},words {number}" for number in range(20)]
    found = load(csv(tmp_path, "Label,phrase", *rows))
    assert found.record["columns"] == {"text": "phrase", "label": "Label"}


def test_numbers_as_classes_have_one_name_and_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": [2, 10, 2.0, -1][n % 4]} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load(tmp_path / "a.jsonl").labels == ("-1", "2", "10")


def test_pairs_have_classes_or_numbers_and_both_ways_round_is_one_pair(tmp_path: Path) -> None:
    rows = [f"a{n},b{n},{n % 2}" for n in range(40)]
    turned = [f"b{n},a{n},{n % 2}" for n in range(40)]
    found = load(csv(tmp_path, "sentence1,sentence2,label", *rows, *turned), "sentence-pairs")
    assert found.labels == ("0", "1")
    keys = [
        {frozenset((row["text"], row["text2"])) for row in part} for part in (found.train, found.validation, found.test)
    ]
    assert sum(map(len, keys)) == 40
    numbers = load(
        csv(tmp_path, "sentence1,sentence2,score", *(f"a{n},b{n},0.{n}" for n in range(40))), "sentence-pairs"
    )
    assert numbers.labels == ()
    assert "label_kind: numbers (seen from 'score')" in numbers.notes


def test_a_text_is_held_out_in_stretches_that_lose_nothing(tmp_path: Path) -> None:
    path = tiny_data.play(tmp_path / "a.txt")
    found = load(path, "causal-lm")
    pieces = [row["passage"] for row in (*found.train, *found.validation, *found.test)]
    text = path.read_text()
    assert all(piece.strip() in text for piece in pieces)
    assert sum(map(len, pieces)) == len(text) + 2
    assert len(found.test) == len(found.validation) > 5


def test_of_many_texts_whole_ones_are_held_out(tmp_path: Path) -> None:
    paths = []
    for number in range(10):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(f"play {number}\n\nends")
    found = load(paths, "causal-lm")
    assert [len(found.train), len(found.validation), len(found.test)] == [8, 1, 1]
    assert found.test[0]["passage"].endswith("ends")


def test_a_text_of_no_known_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x81\x8d")
    with pytest.raises(ValueError, match=r"a\.txt: it is neither UTF-8 nor windows-1252; set `encoding`"):
        load(tmp_path / "a.txt", "causal-lm")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no message of the assistant"),
        (["hi"], "message 1 has to be an object"),
        ([{"role": "user", "content": "hi"}], "no message of the assistant"),
        ([{"role": "bot", "content": "hi"}], "message 1 has the role 'bot'"),
        ([{"role": "user"}], "message 1 has to be an object with `role` and `content`"),
    ],
)
def test_an_invalid_chat_is_reported_with_its_row(tmp_path: Path, messages: list[Any], message: str) -> None:
    path = tiny_data.chats(tmp_path / "a.jsonl")
    with path.open("a") as file:
        file.write("\n" + json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 41: .*{message}"):
        load(path, "causal-lm")


def test_an_integer_beyond_all_floats_is_no_number_to_train_with(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "rating": 1}}\n{{"text": "b", "rating": 1{"0" * 400}}}')
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: the label 10+ is not finite"):
        load(tmp_path / "a.jsonl", "regression")


HALF = "\udc00"
HALVED = {
    "text-classification": {"text": "a", "label": HALF},
    "regression": {"text": f"b{HALF}", "label": 1.5},
    "sentence-pairs": {"text1": "a", "text2": HALF, "label": "x"},
    "token-classification": {"text": "abc", "entities": [{"start": 0, "end": 1, "label": HALF}]},
    "causal-lm": {"messages": [{"role": "user", "content": HALF}, {"role": "assistant", "content": "a"}]},
}


@pytest.mark.parametrize("task", HALVED)
def test_half_a_character_is_refused_with_its_row_in_every_task(tmp_path: Path, task: str) -> None:
    row = HALVED[task]
    (tmp_path / "a.jsonl").write_text(json.dumps(json.loads(json.dumps(row).replace("\\udc00", "x"))) + "\n")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps(row))
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: column '\w+' holds '\\udc00', half of .*remove it"):
        load(tmp_path / "a.jsonl", task)


def test_the_name_of_a_class_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = tiny_data.images(tmp_path / "squares")
    (folder / "dark").rename(folder / "d\udcff")
    with pytest.raises(ValueError, match=r"squares: the folder 'd\\udcff' has a name that is no UTF-8 text; rename it"):
        load(folder, "image-classification")


def test_a_folder_of_images(tmp_path: Path) -> None:
    folder = tiny_data.images(tmp_path / "squares")
    (folder / "dark" / "again.png").write_bytes((folder / "dark" / "0.png").read_bytes())
    (folder / "dark" / "notes.txt").write_text("not an image")
    found = load(folder, "image-classification")
    assert found.labels == ("bright", "dark")
    assert found.record["duplicates_removed"] == 1
    assert sum(map(len, (found.train, found.validation, found.test))) == 40
    before = found.record["files"][str(folder)]["sha256"]
    (folder / "dark" / "0.png").rename(folder / "bright" / "0.png")
    assert load(folder, "image-classification").record["files"][str(folder)]["sha256"] != before
    (folder / "dark" / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"broken\.png is no image"):
        load(folder, "image-classification")


def test_parts_are_not_taken_for_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        tiny_data.images(tmp_path / part)
    with pytest.raises(ValueError, match="holds test, train, which are parts, not classes"):
        load(tmp_path, "image-classification")


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("nothing.csv", "text-classification", "no such file"),
        (".", "text-classification", "is a folder; give files"),
        ("a.txt", "text-classification", "has no columns"),
        ("a.txt", "image-classification", "is a file; image-classification reads a folder"),
        (".", "image-classification", "holds no folders with images"),
    ],
)
def test_data_of_another_kind_is_reported(tmp_path: Path, name: str, task: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name, task)
