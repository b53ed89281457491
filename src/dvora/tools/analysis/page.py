"""The report of an analysis: one HTML page."""

from collections.abc import Sequence

import numpy as np

from ..pages.page import Section, Table, matrix, page
from . import Analysis, LayerChange
from .measures import means
from .pictures import drift, kinds_of, magnitude_and_direction, sizes, spectra

MANY = 400
"""Layers beyond which the table has types only."""


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
