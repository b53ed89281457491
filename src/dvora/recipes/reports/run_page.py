"""The page of a finished run: how good it is, where it is wrong, what was trained, and whether the adapter is right."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from peft import PeftModel

from ...text import shown
from ...tools.analysis import analyze
from ...tools.analysis.report import magnitude_and_direction
from ...tools.doctor import examine
from ...tools.pages.page import Section, Table, matrix, page
from ...tools.pages.pictures import COLOURS, GREY, label, new_figure, svg
from ...whole_files import write_atomically
from ..data.images import opened_image
from ..models.hub import offline
from ..run_folder import Run, read_run
from ..settings import NOTHING, Trust
from ..tasks.calibration import calibration_sentence
from ..tasks.metrics import limits_of, metric_rows
from ..tasks.task import Truncation
from .evaluation import unchanged_data
from .examination import EXAMINED
from .generation import Continuation, continuations
from .prediction import Compared, compared
from .run_model import Rows, RunModel

SHOWN = 8
"""Examples of each kind."""
LETTERS = 240
TOKENS = 60
MOST_WRONG = 50
THUMBNAIL = 72
MOST_CLASSES = 30
"""Classes beyond which there is no matrix, but a list of the commonest mistakes."""
MAIN_METRICS = ("accuracy", "f1", "pearson", "bits_per_byte", "perplexity")


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
    data, settings = unchanged_data(run), run.settings
    held_out = (data.test or data.validation)[:rows]
    if not held_out:
        raise ValueError(f"the run in {folder} held no rows out, so there is nothing to show that it has not seen")
    other = None if against is None else read_run(against, trust)
    part = "test" if data.test else "validation"
    sections = [_metrics(run), _trained(run), _curves(run.record["history"], run.record["best_step"])]
    if settings.task == "causal-lm":
        sections.append(_texts(continuations(run, held_out, SHOWN // 2, TOKENS)))
    elif run.labels and settings.task != "token-classification":
        sections += _classes(run, data.train, compared(run, held_out, other), other)
    elif not run.labels:
        sections += _numbers(compared(run, held_out, other))
    verdict = [*run.record.get("verdict", ())]
    trained = RunModel(run)
    if isinstance(trained.model, PeftModel):
        drawn = magnitude_and_direction(analyze(trained.model).changes[0])
        explained = ["One point a layer; dvora analyze shows more."]
        sections.append(Section("What changed in the layers", explained, [drawn]))
        if doctor:
            with offline():
                examination = examine(trained.model, trained.batch((data.test or data.train)[:EXAMINED]))
            verdict.append(f"The doctor on the adapter: {examination.verdict}")
            advice = [f"{finding.check}: {finding.advice}." for finding in examination.findings if finding.advice]
            sections.append(Section("Is the adapter right?", advice, tables=[Table(examination.rows())], wide=True))
    text = page(
        f"A run of dvora train: {folder.resolve().name}",
        f"{settings.method} on {Path(settings.model).name}, {settings.task}; examples and counts are of "
        f"{len(held_out):,} of its {part} rows.",
        sections,
        "Made by dvora report.",
        verdict,
        _figures(run, part, sum(parameter.numel() for parameter in trained.model.parameters())),
    )
    write_atomically(output, text.encode())


def _figures(run: Run, part: str, parameters: int) -> dict[str, str]:
    """The numbers on top: the main metric beside the baseline's, and what it cost."""
    metrics, trained = run.record["metrics"], run.record["trained_parameters"]
    scores = {}
    if name := next((name for name in MAIN_METRICS if name in metrics.get(part, {})), None):
        labels = {part: f"{part} {name.replace('_', ' ')}"}
        labels |= {f"{part}_head_alone": "head alone", f"{part}_before_training": "before training"}
        scores = {label: shown(metrics[key][name]) for key, label in labels.items() if name in metrics.get(key, {})}
    size = sum(file.stat().st_size for file in run.adapter.rglob("*") if file.is_file())
    return {
        **scores,
        "trained parameters": f"{trained:,} ({trained / parameters:.2%})",
        "size on disk": f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB",
        "steps": f"{run.record['steps']:,}",
        "time": f"{run.record['seconds']:.0f} s",
    }


def _metrics(run: Run) -> Section:
    by_part: dict[str, list[dict[str, Any]]] = {}
    for row in metric_rows(run.record["metrics"]):
        part = str(row.pop("part"))
        by_part.setdefault(part, []).append({name.replace("_", " "): value for name, value in row.items()})
    text = []
    if any(part.endswith("head_alone") for part in run.record["metrics"]):
        text = ["Head alone: a linear layer fitted to the frozen base. What the adapter adds is the difference."]
    if calibration := run.record.get("calibration"):
        text.append(f"{calibration_sentence(calibration)}.")
    # The rows that were held out for the test come first.
    tables = [Table(by_part[part], f"{part} rows") for part in sorted(by_part)]
    return Section("How good it is", text, tables=tables)


def _classes(run: Run, train: Rows, rows: Sequence[Compared], other: Run | None) -> list[Section]:
    name = "head alone" if other is None else other.folder.name
    _, labels, predicted, predicted_by_other, _ = zip(*rows, strict=True)
    wrong = [row for row in rows if row.predicted != row.label]
    right = len(rows) - len(wrong)
    text = f"{right:,} of {len(rows):,} right ({right / len(rows):.1%})."
    learned = Counter(run.labels[row["label"]] for row in train)
    scores = [{**row, "training rows": learned[row["class"]]} for row in _scores(run.labels, labels, predicted)]
    if None not in predicted_by_other:
        other_scores = _scores(run.labels, labels, predicted_by_other)
        scores = [{**row, f"F1, {name}": other_row["F1"]} for row, other_row in zip(scores, other_scores, strict=True)]
    scores.sort(key=lambda row: row["F1"])
    sections = [Section("Scores of each class", [text, "The worst class first."], tables=[Table(scores)])]
    sections.append(_mistakes(run.labels, Counter(zip(labels, predicted, strict=True))))
    sections += [*([_wrong(wrong)] if wrong else []), _limits(rows)]
    if None in predicted_by_other:
        return sections
    gained = [row for row in rows if row.predicted == row.label != row.other]
    lost = [row for row in rows if row.predicted != row.label == row.other]
    counts = f"{len(gained):,} rows are right here and wrong with {name}, {len(lost):,} the other way."
    tables = [
        Table(_examples(gained, name), f"right here, wrong with {name}"),
        Table(_examples(lost, name), f"wrong here, right with {name}"),
    ]
    return [*sections, Section(f"Compared with {name}", [counts], tables=tables, wide=True)]


def _wrong(wrong: Sequence[Compared]) -> Section:
    surest = sorted(wrong, key=lambda row: -(row.probability or 0))[:MOST_WRONG]
    text = f"{len(wrong):,} rows, the surest first" + f"; the first {MOST_WRONG}" * (len(wrong) > MOST_WRONG)
    rows = [
        {"row": _row(row.row), "true": row.label, "predicted": row.predicted, "probability": row.probability}
        for row in surest
    ]
    return Section("Rows that it gets wrong", [f"{text}."], tables=[Table(rows)], wide=True)


def _limits(rows: Sequence[Compared]) -> Section:
    found = np.array([[row.predicted == row.label, 1, 0, row.probability] for row in rows], float)
    text = "How many rows are answered, and how many of those right, if no class below a probability is named."
    warning = "Abstaining finds rows that are hard, not rows that are foreign: of those a model can be quite sure."
    table = [{name.replace("_", " "): value for name, value in row.items()} for row in limits_of(found)]
    return Section("Abstaining", [text, warning], tables=[Table(table)])


def _scores(classes: Sequence[str], labels: Sequence[Any], predicted: Sequence[Any]) -> list[dict[str, Any]]:
    """A row of a table for each class."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    names = ("precision", "recall", "F1", "rows")
    return [
        {"class": name, **{score: round(float(value), 3) for score, value in zip(names, values, strict=True)}}
        for name, *values in zip(classes, *scores, strict=True)
    ]


def _mistakes(classes: Sequence[str], counts: Mapping[tuple[Any, Any], int]) -> Section:
    """How often each class was predicted as each, shaded by its share of the true class."""
    heading = "Which classes it mistakes for which"
    if len(classes) > MOST_CLASSES:
        wrong = Counter({pair: count for pair, count in counts.items() if len({*pair}) > 1}).most_common(MOST_CLASSES)
        rows = [{"true": true, "predicted": predicted, "rows": count} for (true, predicted), count in wrong]
        return Section(heading, ["The commonest mistakes."], tables=[Table(rows)])
    cells = []
    for true in classes:
        line = np.array([counts[true, predicted] for predicted in classes])
        shades = line / max(1, line.sum()) * [1 if predicted == true else -1 for predicted in classes]
        cells.append([(str(count or ""), float(shade)) for count, shade in zip(line, shades, strict=True)])
    drawn = matrix(classes, classes, cells, "Confusion matrix: true classes down, predicted classes across")
    text = "True classes down, predicted classes across; right ones are blue, mistakes orange."
    return Section(heading, [text], [drawn])


def _examples(rows: Sequence[Compared], *names: str) -> list[dict[str, Any]]:
    columns = ("true", "predicted", *names)
    return [{"row": _row(row), **dict(zip(columns, values, strict=False))} for row, *values in rows[:SHOWN]]


def _numbers(rows: Sequence[Compared]) -> list[Section]:
    true, predicted = ([float(getattr(row, name)) for row in rows] for name in ("label", "predicted"))
    figure, (axes,) = new_figure(4.2, 3.8)
    axes.plot(true, predicted, ".", color=COLOURS[0], alpha=0.5)
    ends = [min(*true, *predicted), max(*true, *predicted)]
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="true", ylabel="predicted")
    furthest = sorted(rows, key=lambda row: -abs(float(row.predicted) - float(row.label)))
    return [
        Section("Predicted and true numbers", pictures=[svg(figure, "Predicted against true numbers")]),
        Section("Rows that are furthest off", tables=[Table(_examples(furthest))]),
    ]


def _curves(history: Sequence[Mapping[str, Any]], best_step: int) -> Section:
    """Training loss (each step, and smoothed) and validation metrics."""

    def points(name: str) -> list[Any]:
        return [*zip(*((entry["step"], entry[name]) for entry in history if name in entry), strict=True)]

    if not (losses := points("loss")):
        return Section("Training", ["No loss is on record."])
    names = [name for entry in history for name in entry if name.startswith("eval_") and name != "eval_loss"]
    # A single evaluation is a number in a table, no curve.
    metric = next((name for name in names if names.count(name) > 1), None)
    figure, (upper, *lower) = new_figure(5, 4.6 if metric else 2.9, 2 if metric else 1)
    steps, values = losses
    upper.plot(steps, values, color=COLOURS[0], alpha=0.3, linewidth=0.8)
    upper.plot(steps, _smoothed(values), color=COLOURS[0], label="training")
    evaluated = {"marker": "o", "markersize": 4, "color": COLOURS[1]}
    if checked := points("eval_loss"):
        upper.plot(*checked, label="validation", **evaluated)
    upper.set(ylabel="loss", xlabel="step")
    upper.legend(frameon=False)
    if metric:
        lower[0].plot(*points(metric), **evaluated)
        lower[0].set(xlabel="step", ylabel=label(f"validation {metric.removeprefix('eval_').replace('_', ' ')}"))
    for axes in (upper, *lower):
        axes.locator_params(axis="x", integer=True)
        axes.axvline(best_step, color=GREY, linewidth=1, linestyle=":")
    drawn = svg(figure, "Loss and validation metrics along the steps; a dotted line at the step that was kept")
    return Section("Training", pictures=[drawn])


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving averages, without the bias of their start."""
    weight = min(0.95, 1 - 1 / max(2, len(values) / 15))
    means = accumulate(values, lambda mean, value: weight * mean + (1 - weight) * value, initial=0.0)
    return [mean / (1 - weight**count) for count, mean in enumerate(means) if count]


def _texts(texts: Sequence[Continuation]) -> Section:
    rows = [dict(zip(("prompt", "with the adapter", "without"), astuple(text), strict=True)) for text in texts]
    text = [f"Beginnings of held-out texts, and the {TOKENS} likeliest tokens that follow, one after the other."]
    text = text if rows else ["No held-out text is long enough to begin with."]
    return Section("Texts", text, tables=[Table(rows)], wide=True)


def _trained(run: Run) -> Section:
    settings, record = run.settings, run.record
    truncation = {part: Truncation(**counts) for part, counts in record.get("truncation", {}).items()}
    sentences = {part: lost.sentence(record.get("max_length", 0)) for part, lost in truncation.items()}
    facts: dict[str, Any] = {
        "base": Path(settings.model).name,
        "data": ", ".join(Path(path).name for path in settings.data),
        "rows": ", ".join(f"{part} {count:,}" for part, count in record["data"]["rows"].items()),
        "method": settings.method,
        "rank": settings.rank,
        "groups of lambda_d": settings.lambda_d_groups if settings.lambda_d_groups > 1 else None,
        "learning rate": settings.learning_rate,
        "other rates": ", ".join(f"{name} {rate:.3g}" for name, rate in record.get("learning_rates", {}).items()),
        "kept step": f"{record['best_step']:,} of {record['steps']:,}",
        "texts that were cut": "; ".join(f"{part}: {sentence}" for part, sentence in sentences.items() if sentence),
    }
    rows = [{"": name, " ": shown(value)} for name, value in facts.items() if value not in (None, "")]
    return Section("What was trained", tables=[Table(rows, headed=False)])


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
