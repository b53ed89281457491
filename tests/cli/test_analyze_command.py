"""dvora analyze as it is typed, and its report in a browser."""

import json
from pathlib import Path

import pytest

from tests.cli.program import assert_refused, run
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import save
from tests.tools.pages.seen import PHONE, WIDE, seen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, the checkpoints of a trainer, and their base."""
    folder = tmp_path_factory.mktemp("work")
    base = tiny_models.bert(folder / "base")
    save(base, folder / "adapter", "dvora")
    save(base, folder / "other-adapter", "dvora", projection_seed=1)
    save(base, folder / "vera", "vera")
    for step in (5, 10, 100):
        save(base, folder / "trainer-output" / f"checkpoint-{step}", "dvora")
    return folder


@pytest.fixture(autouse=True)
def at_work(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(made)


def test_the_report_has_figures_and_the_same_as_json(made: Path) -> None:
    result = json.loads(run("dvora analyze adapter other-adapter --model base -o two.html --json").stdout)
    assert (result["report"], result["figures"]) == ("two.html", "two.json")
    content = json.loads((made / "two.json").read_text())
    assert [each["name"] for each in content["adapters"]] == ["adapter", "other-adapter"]
    assert content["steps"] is None
    assert -1 <= content["similarity"][0][1] <= 1
    page = (made / "two.html").read_text(encoding="utf-8")
    assert "Similarity of adapters" in page
    assert "Along the checkpoints" not in page


def test_checkpoints_are_in_the_order_of_their_steps(made: Path) -> None:
    assert run("dvora analyze trainer-output --model base -o drift.html").code == 0
    content = json.loads((made / "drift.json").read_text())
    assert content["steps"] == [5, 10, 100]
    assert [each["name"] for each in content["adapters"]] == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    assert "Along the checkpoints" in (made / "drift.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_the_report_reads_well_in_a_browser(made: Path, width: int, scheme: str) -> None:
    if not (made / "seen.html").exists():
        assert run("dvora analyze trainer-output --model base -o seen.html").code == 0
    with seen(made / "seen.html", width, scheme) as found:
        assert found.width() == width
        assert found.page.locator("svg").count() == 4
        assert found.page.locator("h2").all_inner_texts()[:2] == ["Overview", "Magnitude and direction"]
        assert found.complaints == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("dvora analyze nowhere", "nowhere: no such file or folder"),
        ("dvora analyze adapter vera --model base", "several methods (dvora, vera)"),
        ("dvora analyze adapter --model base -o report.txt", "has to end in .html"),
        ("dvora analyze adapter --model base -o nowhere/report.html", "there is no folder nowhere"),
        ("dvora analyze adapter --model base -o /proc/report.html", "/proc"),
    ],
)
def test_wrong_use_is_one_line(command: str, message: str) -> None:
    assert_refused(command, message)
