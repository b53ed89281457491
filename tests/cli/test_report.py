"""dvora report and doctor as they are typed, on runs of every task, and the page in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dvora.recipes.reports.evaluation import unchanged_data
from dvora.recipes.reports.prediction import Predictor, compared
from dvora.recipes.run_folder import read_run
from tests.cli.program import run
from tests.recipes import tiny_data
from tests.recipes.finished_runs import DATA, finished
from tests.tools.pages.seen import PHONE, WIDE, seen

RUNS = {task: "dvora-run" if task == "text-classification" else task for task in DATA}
"""Folders, by task."""
GROUPED = "regression"
"""The task whose run has lambda_d by groups."""
SECTIONS = ["How good it is", "What was trained", "Training"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each task, and one more of the method "head"."""
    folder = tmp_path_factory.mktemp("work")
    for task, name in RUNS.items():
        settings = {"lambda_d_groups": 3} if task == GROUPED else {}
        shutil.move(finished(task, folder, epochs=3, evaluate_every=2, **settings).folder, folder / name)
    shutil.move(finished("text-classification", folder, method="head").folder, folder / "head-run")
    shutil.move(finished("text-classification", folder, method="full").folder, folder / "full-run")
    return folder


@pytest.fixture(autouse=True)
def at_work(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(made)


@pytest.fixture(scope="module")
def pages(made: Path) -> dict[str, Path]:
    """The page of each run that has an adapter."""
    found = {name: made / f"{name}-page.html" for name in RUNS.values()}
    for name, page in found.items():
        ended = run(f"dvora report {made / name} --output {page}")
        assert ended.code == 0, ended.stderr
    return found


def headings(page: Path) -> list[str]:
    return re.findall("<h2>(.*)</h2>", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", DATA)
def test_runs_of_every_task_have_a_page(task: str, made: Path, pages: dict[str, Path]) -> None:
    name = RUNS[task]
    found = headings(pages[name])
    assert ("groups of lambda_d" in pages[name].read_text(encoding="utf-8")) == (task == GROUPED)
    assert found[:3] == SECTIONS
    middle = {"causal-lm": ["Texts"], "token-classification": []}
    wrong = ["Rows that it gets wrong"] if "Rows that it gets wrong" in found else []
    classes = [
        "Scores of each class",
        "Which classes it mistakes for which",
        *wrong,
        "Abstaining",
        "Compared with head alone",
    ]
    pairs = (
        ["Predicted and true numbers", "Rows that are furthest off"] if not read_run(made / name).labels else classes
    )
    assert found[3:] == [*middle.get(task, pairs), "What changed in the layers", "Is the adapter right?"]


def test_every_class_has_its_scores(made: Path, pages: dict[str, Path]) -> None:
    trained = read_run(made / "dvora-run")
    found = compared(trained, unchanged_data(trained).test)
    page = pages["dvora-run"].read_text(encoding="utf-8")
    right, right_alone = (
        {place for place, row in enumerate(found) if getattr(row, name) == row.label} for name in ("predicted", "other")
    )
    gained, lost = len(right - right_alone), len(right_alone - right)
    assert f"{gained} rows are right here and wrong with head alone, {lost} the other way." in page
    columns = ("precision", "recall", "F1", "rows")
    assert "".join(f'<th scope="col" class="number">{name}</th>' for name in columns) in page
    for name in trained.labels:
        hits = sum(each.label == each.predicted == name for each in found)
        rows, predicted = sum(each.label == name for each in found), sum(each.predicted == name for each in found)
        scores = [hits / max(1, predicted), hits / rows, 2 * hits / (rows + predicted), rows]
        cells = "".join(f'<td class="number">{round(score, 3):.4g}</td>' for score in scores)
        assert re.search(f"<td[^>]*>{name}</td>{cells}", page)


def test_every_wrong_row_is_shown_and_what_abstaining_comes_to(made: Path, pages: dict[str, Path]) -> None:
    trained = read_run(made / "dvora-run")
    found = compared(trained, unchanged_data(trained).test)
    wrong = sorted((row for row in found if row.predicted != row.label), key=lambda row: -(row.probability or 0))
    page = pages["dvora-run"].read_text(encoding="utf-8")
    assert wrong
    assert f"{len(wrong):,} rows, the surest first." in page
    shown = page[page.index("Rows that it gets wrong") :]
    for row in wrong:
        assert re.search(f"<td[^>]*>{re.escape(row.row['text'])}</td><td[^>]*>{row.label}</td>", shown)
    answered = [row for row in found if (row.probability or 0) >= 0.7]
    share, right = len(answered) / len(found), sum(row.predicted == row.label for row in answered)
    cells = [0.7, share, *([right / len(answered)] if answered else [])]
    assert "".join(f'<td class="number">{value:.4g}</td>' for value in cells) in page[page.index("Abstaining") :]
    learned = sum(trained.labels[row["label"]] == trained.labels[0] for row in unchanged_data(trained).train)
    assert re.search(f'<td[^>]*>{trained.labels[0]}</td>.*<td class="number">{learned}</td>', page)


def test_the_rows_that_are_furthest_off_come_first(made: Path, pages: dict[str, Path]) -> None:
    trained = read_run(made / "regression")
    rows = compared(trained, unchanged_data(trained).test)
    worst = max(rows, key=lambda row: abs(float(row.predicted) - float(row.label)))
    page = pages["regression"].read_text(encoding="utf-8")
    first = re.search("<td[^>]*>([^<]*)</td>", page[page.index("Rows that are furthest off") :])
    assert first is not None
    assert first[1] == worst.row["text"]


def test_the_verdict_of_the_run_is_on_top(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "head-run", tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["verdict"] = ["It learned <nothing>.", "Train longer."]
    (folder / "run.json").write_text(json.dumps(record))
    assert run(f"dvora report {folder} --output {tmp_path / 'page.html'}").code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.index("It learned &lt;nothing&gt;.") < page.index("Train longer.") < page.index("<h2>")


@pytest.mark.parametrize("name", ["head-run", "full-run"])
def test_runs_without_an_adapter_have_a_page_and_no_doctor(name: str, made: Path) -> None:
    assert run(f"dvora report {name}").code == 0
    assert headings(made / f"{name}.html")[:3] == SECTIONS
    assert "makes no adapter" in run(f"dvora doctor {name}").stderr


@pytest.mark.parametrize("name", RUNS.values())
def test_runs_of_every_task_are_healthy(name: str) -> None:
    ended = run(f"dvora doctor {name} --json")
    assert ended.code == 0, ended.stdout + ended.stderr
    content = json.loads(ended.stdout)
    assert (content["healthy"], content["verdict"]) == (True, "all 14 checks passed")


def test_answers_are_those_of_the_models(made: Path) -> None:
    trained = read_run(made / "dvora-run")
    rows = unchanged_data(trained).test
    found = compared(trained, rows, read_run(made / "head-run"))
    for name, attribute in (("dvora-run", "predicted"), ("head-run", "other")):
        model = Predictor(read_run(made / name))
        expected = [trained.labels[int(row.argmax())] for row in model._logits(rows)]
        assert [getattr(each, attribute) for each in found] == expected
    assert [each.label for each in found] == [trained.labels[row["label"]] for row in rows]


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("dvora-run", WIDE, "light"), ("image-classification", PHONE, "dark"), ("causal-lm", PHONE, "light")],
)
def test_the_page_reads_well_in_a_browser(pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    with seen(pages[name], width, scheme) as shown:
        assert shown.width() == width
        assert shown.page.locator("svg").count() >= 2
        # What the run says of itself, then the doctor.
        *said, doctor = shown.page.locator(".verdict p").all_inner_texts()
        assert said == read_run(pages[name].parent / name).record["verdict"]
        assert doctor == "The doctor on the adapter: all 14 checks passed"
        assert shown.page.locator("td.pass").count() >= 8
        assert shown.page.locator("td.fail").count() == 0
        assert shown.page.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
        assert shown.complaints == []


def test_a_run_whose_data_has_changed_is_refused(tmp_path: Path) -> None:
    trained = finished("text-classification", tmp_path)
    tiny_data.reviews(tmp_path / "reviews.csv", 61)
    assert "has changed" in run(f"dvora report {trained.folder}").stderr
