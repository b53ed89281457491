"""The report of an analysis: one HTML page, and its pictures."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from ..pages.page import Section, Table, matrix, page
from ..pages.pictures import COLOURS, label, new_figure, svg
from . import Analysis, LayerChange
from .measures import means

MANY = 400
"""Layers beyond which the table has types only."""
MARKS = "os^Dv<>Pp*"
LEGEND_LINE, LEGEND_LETTERS = 0.22, 60
"""Of a legend: height of a line in inches, and letters in it."""


def report(analysis: Analysis, title: str, foot: str, steps: Sequence[int] | None = None) -> str:
    """The page.

    Args:
        analysis: of one or several adapters; of several, layers are those of the last.
        title: of the page.
        foot: what made it.
        steps: of the checkpoints, where the adapters are those of one training.
    """
    changes = analysis.changes[-1]
    lead = f"What training changed in {len(changes)} layers, against the base model's weights."
    if len(names := analysis.adapters) > 1:
        lead += f" {len(names)} adapters are compared; layers are shown of the last, {names[-1]}."
    rows = [
        {"adapter": name, "layers": len(layers), **_means(layers)}
        for name, layers in zip(analysis.adapters, analysis.changes, strict=True)
    ]
    moved = sorted(changes, key=lambda layer: -layer.change.size)[:3]
    most = [f"{layer.layer} ({layer.change.size:.1%})" for layer in moved]
    sections = [
        Section("Overview", ["Means over layers."], tables=[Table(rows)], wide=True),
        _directions(analysis),
        Section("Which layers moved", [f"Most: {', '.join(most)}."], [sizes(changes)]),
        _spectra(changes),
    ]
    if steps is not None:
        sections.append(Section("Along the checkpoints", [], [drift(analysis, steps)]))
    elif len(analysis.adapters) > 1:
        sections.append(_similarity(analysis))
    return page(title, lead, [*sections, _layers(changes)], foot)


def _directions(analysis: Analysis) -> Section:
    correlation = analysis.correlation(len(analysis.changes) - 1)
    text = [
        "One point a layer. In the DoRA paper, layers change either magnitude or direction in full fine-tuning and in "
        "DoRA (a negative slope), and both at once in LoRA (a positive one)."
    ]
    if correlation is not None:
        text.append(f"Correlation here: {correlation:+.2f}.")
    return Section("Magnitude and direction", text, [magnitude_and_direction(analysis.changes[-1])])


def _spectra(changes: Sequence[LayerChange]) -> Section:
    ranks = [layer.spectrum.effective_rank for layer in changes]
    text = [
        "Singular values of W' - W, as shares of the largest singular value of W.",
        f"Effective rank: {min(ranks):.1f} to {max(ranks):.1f}, median {float(np.median(ranks)):.1f}.",
    ]
    if not all(layer.spectrum.complete for layer in changes):
        text.append("Of large matrices the 64 largest values are shown, and the effective rank is of those.")
    return Section("Spectrum of the update", text, [spectra(changes)])


def _similarity(analysis: Analysis) -> Section:
    text = [
        "Cosines of the whole updates: one for equal directions, zero for unrelated ones, minus one for opposite ones."
    ]
    cells = [[(f"{value:.2f}", value) for value in row] for row in analysis.similarity]
    drawn = matrix(analysis.adapters, analysis.adapters, cells, "Cosines of the updates of adapters")
    return Section("Similarity of adapters", text, [drawn])


def _layers(changes: Sequence[LayerChange]) -> Section:
    if len(changes) > MANY:
        rows = [
            {"type": kind, **_means([layer for layer in changes if layer.kind == kind])} for kind in kinds_of(changes)
        ]
        return Section("Types of layers", tables=[Table(rows)], wide=True)
    rows = [{"layer": layer.layer, "shape": " x ".join(map(str, layer.shape)), **_means([layer])} for layer in changes]
    return Section("Layers", tables=[Table(rows)], wide=True)


def _means(changes: Sequence[LayerChange]) -> dict[str, float]:
    ranks = [layer.spectrum.effective_rank for layer in changes]
    return {**means([layer.change for layer in changes]), "effective rank": float(np.mean(ranks))}


def kinds_of(changes: Sequence[LayerChange]) -> list[str]:
    """The types of layers, in the order of the model."""
    return list(dict.fromkeys(layer.kind for layer in changes))


def magnitude_and_direction(changes: Sequence[LayerChange]) -> Markup:
    """One point a layer: the change of its magnitude against that of its direction (DoRA paper, figure 2)."""
    figure, axes = _figure(2.9, changes)
    for where, mark, style in _by_kind(changes):
        points = [changes[index].change for index in where]
        axes.plot(
            [point.direction for point in points], [point.magnitude for point in points], mark, alpha=0.85, **style
        )
    axes.set(xlabel="change of direction, mean of 1 - cos", ylabel="relative change of magnitude")
    axes.set_xlim(left=0)
    # Shares such as 0.00125 take room.
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(bottom=0)
    return _with_legend(figure, "Change of magnitude against change of direction, a point a layer")


def sizes(changes: Sequence[LayerChange]) -> Markup:
    """How far each layer was moved, along the model."""
    figure, axes = _figure(2.5, changes)
    for where, mark, style in _by_kind(changes):
        axes.plot(where, [changes[index].change.size for index in where], marker=mark, linewidth=1, **style)
    axes.set(xlabel="layer, in the order of the model", ylabel="||W' - W|| / ||W||")
    axes.set_ylim(bottom=0)
    return _with_legend(figure, "Size of the update of each layer along the model")


def spectra(changes: Sequence[LayerChange]) -> Markup:
    """Singular values of the updates: the median over the layers of a type."""
    figure, axes = _figure(2.5, changes)
    for where, _, style in _by_kind(changes):
        spectra = [changes[index].spectrum.values for index in where]
        length = min(map(len, spectra))
        values = np.array([values[:length] for values in spectra])
        axes.plot(range(1, length + 1), np.median(values, axis=0), linewidth=1.5, **style)
    axes.set(yscale="log", xlabel="singular value", ylabel="share of the weight's largest")
    if limits := log_limits(np.concatenate([line.get_ydata() for line in axes.lines])):
        axes.set_ylim(*limits)
    return _with_legend(figure, "Singular values of the updates, medians over layers of a type")


def log_limits(drawn: np.ndarray) -> tuple[float, float] | None:
    """Ends of a logarithmic axis without decades in which nothing is drawn, nor those of rounding."""
    positive = drawn[drawn > 0]
    if not len(positive):
        return None
    return float(max(positive.min(), positive.max() * 1e-6)) / 1.5, float(positive.max()) * 1.5


def drift(analysis: Analysis, steps: Sequence[int]) -> Markup:
    """Along checkpoints: how far the adapter is from the base, and how alike its last state."""
    figure, (upper, lower) = new_figure(5, 4.6, 2)
    means = [np.mean([layer.change for layer in changes], axis=0) for changes in analysis.changes]
    names = list(analysis.changes[0][0].change._fields)
    for place, (name, shown) in enumerate({"magnitude": "magnitude", "direction": "direction, 1 - cos"}.items()):
        values = [mean[names.index(name)] for mean in means]
        upper.plot(steps, values, marker="o", markersize=3, color=COLOURS[place], label=shown)
    upper.set(
        xlabel="step", ylabel="mean change", yscale="log" if min(min(mean[:1]) for mean in means) > 0 else "linear"
    )
    upper.legend(frameon=False)
    lower.plot(steps, [row[-1] for row in analysis.similarity], marker="o", markersize=3, color=COLOURS[2])
    lower.set(xlabel="step", ylabel="cosine with the last", ylim=(-0.05, 1.05))
    return svg(figure, "Change of magnitude and direction along checkpoints, and similarity to the last")


def _by_kind(changes: Sequence[LayerChange]) -> Iterator[tuple[list[int], str, dict[str, str]]]:
    """The places of each type's layers, and the type's mark, colour and label: the same in every picture."""
    for place, kind in enumerate(kinds_of(changes)):
        where = [index for index, layer in enumerate(changes) if layer.kind == kind]
        yield where, MARKS[place % len(MARKS)], {"color": COLOURS[place % len(COLOURS)], "label": label(kind)}


def _with_legend(figure: Figure, description: str) -> Markup:
    """The figure with a legend above the axes, in columns."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=_columns(labels), frameon=False)
    return svg(figure, description)


def _figure(height: float, changes: Sequence[LayerChange]) -> tuple[Figure, Any]:
    """A figure with axes of that height, in inches, and room for the legend of all types."""
    types = kinds_of(changes)
    figure, (axes,) = new_figure(5, height + LEGEND_LINE * ceil(len(types) / _columns(types)))
    return figure, axes


def _columns(labels: Sequence[str]) -> int:
    """As many as fit the width of a figure."""
    return max(1, min(4, LEGEND_LETTERS // (max(map(len, labels), default=1) + 7)))
