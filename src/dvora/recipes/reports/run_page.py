"""The page of a finished run: what was trained, its curves, its predictions, and whether the adapter is right."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from peft import PeftModel

from ...tools.analysis import analyze
from ...tools.analysis.pictures import magnitude_and_direction
from ...tools.doctor import Examination, examine
from ...tools.pages.page import Section, Table, page
from ...tools.pages.text import shown
from ...whole_files import write_atomically
from ..data.images import opened_image
from ..models.hub import offline
from ..models.trained import load_trained
from ..run_folder import Run, read_run
from ..settings import NOTHING, Trust
from ..tasks.metrics import metric_rows
from ..tasks.task import Truncation
from .comparison import Compared, compared, continuations
from .evaluation import unchanged_data
from .examination import EXAMINED, batch_of
from .generation import Continuation
from .run_pictures import confusion, curves, numbers

SHOWN = 8
"""Examples of each kind."""
LETTERS = 240
TOKENS = 60
THUMBNAIL = 72


@dataclass(frozen=True)
class Sizes:
    """Bytes that are kept.

    Args:
        base: the values of the base.
        adapter: the folder of what was trained.
    """

    base: int
    adapter: int


def write_page(
    folder: Path,
    output: Path,
    against: Path | None = None,
    rows: int = 500,
    doctor: bool = True,
    trust: Trust = NOTHING,
) -> None:
    """Write the page of a run.

    Args:
        folder: of a finished run.
        output: a file that ends in .html.
        against: another run of the same task and classes, to show what this one gets right that the other does not, and
            the other way; None: the head alone on the frozen base.
        rows: held-out rows to predict for at most.
        doctor: whether to check the adapter.
        trust: what is allowed to get the runs' bases.

    Raises:
        ValueError: the run is not finished, its data has changed, or it held no rows out.
        OSError: a file cannot be read or written.
    """
    run = read_run(folder, trust)
    data = unchanged_data(run)
    held_out = (data.test or data.validation)[:rows]
    if not held_out:
        raise ValueError(f"the run in {folder} held no rows out, so there is nothing to show that it has not seen")
    other = None if against is None else read_run(against, trust)
    sections = [_trained(run), _curves(run), _metrics(run)]
    if run.settings.task == "causal-lm":
        sections.append(_texts(continuations(run, held_out, SHOWN // 2, TOKENS)))
    else:
        sections += _predictions(run, compared(run, held_out, other), other)
    sections += _layers(run, data.test or data.train, doctor)
    settings = run.settings
    lead = f"{settings.method} on {Path(settings.model).name}, {settings.task}; {held_out_text(run, len(held_out))}."
    title = f"A run of dvora train: {folder.resolve().name}"
    write_atomically(output, page(title, lead, sections, "Made by dvora report.").encode())


def held_out_text(run: Run, count: int) -> str:
    """How many rows the page is about."""
    part = "test" if run.record["data"]["rows"].get("test") else "validation"
    return f"examples and counts are of {count:,} of its {part} rows"


def _trained(run: Run) -> Section:
    settings, record = run.settings, run.record
    sizes = _sizes(run)
    facts: dict[str, Any] = {
        "base": Path(settings.model).name,
        "data": ", ".join(Path(path).name for path in settings.data),
        "rows": ", ".join(f"{part} {count:,}" for part, count in record["data"]["rows"].items()),
        "method": settings.method,
        "rank": settings.rank,
        "learning rate": settings.learning_rate,
        "other rates": ", ".join(f"{name} {rate:.3g}" for name, rate in record.get("learning_rates", {}).items()),
        "steps": record["steps"],
        "kept step": record["best_step"],
        "time": f"{record['seconds']:.0f} s",
        "trained parameters": record["trained_parameters"],
        "size on disk": _bytes(sizes.adapter),
        "size of the base": _bytes(sizes.base),
        "texts that were cut": _cut(run),
    }
    rows = [{"": name, " ": shown(value)} for name, value in facts.items() if value not in (None, "")]
    return Section("What was trained", [], tables=[Table(rows)])


def _cut(run: Run) -> str:
    """What the texts lost at `max_length`, part by part."""
    length = run.record.get("max_length", 0)
    parts = {part: Truncation(**found) for part, found in run.record.get("truncation", {}).items()}
    return "; ".join(f"{part}: {found.sentence(length)}" for part, found in parts.items() if found.cut)


def _curves(run: Run) -> Section:
    drawn = curves(run.record["history"], run.record["best_step"])
    return Section("Training", [] if drawn else ["No loss is on record."], [drawn] if drawn else [])


def _metrics(run: Run) -> Section:
    rows = [
        {name.replace("_", " "): value for name, value in row.items()} for row in metric_rows(run.record["metrics"])
    ]
    text = []
    if any(part.endswith("head_alone") for part in run.record["metrics"]):
        text = ["Head alone: a linear layer fitted to the frozen base. What the adapter adds is the difference."]
    return Section("How good it is", text, tables=[Table(rows)])


def _predictions(run: Run, found: Sequence[Compared], other: Run | None) -> list[Section]:
    if not run.labels:
        pairs = [(float(each.label), float(each.predicted)) for each in found]
        return [Section("Predicted and true numbers", [], [numbers(pairs)], [Table(_furthest(found), "furthest off")])]
    drawn = confusion([(str(each.label), str(each.predicted)) for each in found], run.labels)
    right = sum(each.predicted == each.label for each in found)
    text = [f"{right:,} of {len(found):,} right ({right / len(found):.1%})."]
    matrix = Section("Which classes it mistakes for which", text, [drawn] if drawn else [])
    if any(each.other is None for each in found):
        return [matrix]
    name = "head alone" if other is None else other.folder.name
    gained = [each for each in found if each.predicted == each.label != each.other]
    lost = [each for each in found if each.predicted != each.label == each.other]
    tables = [
        Table(_examples(gained, name), f"right here, wrong with {name}: {len(gained):,}"),
        Table(_examples(lost, name), f"wrong here, right with {name}: {len(lost):,}"),
    ]
    return [matrix, Section(f"Compared with {name}", [], tables=tables)]


def _furthest(found: Sequence[Compared]) -> list[dict[str, Any]]:
    ordered = sorted(found, key=lambda each: -abs(float(each.predicted) - float(each.label)))
    return [{"row": _row(each.row), "true": each.label, "predicted": each.predicted} for each in ordered[:SHOWN]]


def _examples(found: Sequence[Compared], name: str) -> list[dict[str, Any]]:
    return [
        {"row": _row(each.row), "true": each.label, "predicted": each.predicted, name: each.other}
        for each in found[:SHOWN]
    ]


def _texts(found: Sequence[Continuation]) -> Section:
    rows = [
        {"prompt": each.prompt, "with the adapter": each.with_adapter, "without": each.without_adapter}
        for each in found
    ]
    text = [f"Beginnings of held-out texts, and the {TOKENS} likeliest tokens that follow, one after the other."]
    return Section("Texts", text if rows else ["No held-out text is long enough to begin with."], tables=[Table(rows)])


def _layers(run: Run, rows: Sequence[dict[str, Any]], doctor: bool) -> list[Section]:
    if run.settings.method in ("full", "head"):
        return []
    model, processor = load_trained(run)
    sections = []
    if isinstance(model, PeftModel):
        found = analyze(model)
        text = ["One point a layer; dvora analyze shows more."]
        sections.append(Section("What changed in the layers", text, [magnitude_and_direction(found.changes[0])]))
    if doctor:
        batch = batch_of(run, model, processor, rows[:EXAMINED])
        with offline():
            sections.append(_doctor(examine(model, batch)))
    return sections


def _doctor(found: Examination) -> Section:
    advice = [f"{each.check}: {each.advice}." for each in found.findings if each.advice]
    return Section("Is the adapter right?", [f"Verdict: {found.verdict}", *advice], tables=[Table(found.rows())])


def _sizes(run: Run) -> Sizes:
    base, _ = load_trained(run, with_adapter=False)
    values = sum(each.numel() * each.element_size() for each in base.parameters())
    return Sizes(values, sum(file.stat().st_size for file in run.adapter.rglob("*") if file.is_file()))


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _row(row: Mapping[str, Any]) -> str | Markup:
    """A row as a cell: its texts, cut, or its image, small."""
    if "image" in row:
        return _thumbnail(Path(row["image"]))
    texts = [row[name] for name in ("text", "text2") if name in row]
    return " | ".join(text if len(text) <= LETTERS else text[: LETTERS - 1] + "…" for text in texts)


def _thumbnail(path: Path) -> Markup:
    with opened_image(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return Markup(f'<img alt="{escape(path.name)}" width="{small.width}" src="data:image/png;base64,{data}">')
