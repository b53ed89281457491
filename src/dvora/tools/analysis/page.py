"""The report of an analysis: one HTML page."""

from collections.abc import Sequence

import numpy as np

from ..pages.page import Section, Table, page
from . import Analysis, LayerChange
from .measures import means
from .pictures import drift, kinds_of, magnitude_and_direction, similarity, sizes, spectra

MANY = 400
"""Layers beyond which the table has types only."""


def report(found: Analysis, title: str, foot: str, steps: Sequence[int] | None = None) -> str:
    """The page.

    Args:
        found: the analysis of one or several adapters; of several, layers are those of the last.
        title: of the page.
        foot: what made it.
        steps: of the checkpoints, where the adapters are those of one training.
    """
    changes = found.changes[-1]
    several = len(found.adapters) > 1
    lead = f"What training changed in {len(changes)} layers, against the base model's weights."
    if several:
        lead += f" {len(found.adapters)} adapters are compared; layers are shown of the last, {found.adapters[-1]}."
    sections = [_overview(found), _directions(found, changes), _places(changes), _spectra(changes)]
    if several:
        sections.append(_similarity(found) if steps is None else _drift(found, steps))
    return page(title, lead, [*sections, _layers(changes)], foot)


def _overview(found: Analysis) -> Section:
    rows = [
        {"adapter": name, "layers": len(changes), **_means(changes)}
        for name, changes in zip(found.adapters, found.changes, strict=True)
    ]
    return Section("Overview", ["Means over layers."], tables=[Table(rows)])


def _directions(found: Analysis, changes: Sequence[LayerChange]) -> Section:
    correlation = found.correlation(len(found.changes) - 1)
    text = [
        "One point a layer. In the DoRA paper, layers change either magnitude or direction in full fine-tuning and in "
        "DoRA (a negative slope), and both at once in LoRA (a positive one)."
    ]
    if correlation is not None:
        text.append(f"Correlation here: {correlation:+.2f}.")
    return Section("Magnitude and direction", text, [magnitude_and_direction(changes)])


def _places(changes: Sequence[LayerChange]) -> Section:
    most = sorted(changes, key=lambda each: -each.change.size)[:3]
    names = ", ".join(f"{each.layer} ({each.change.size:.1%})" for each in most)
    return Section("Which layers moved", [f"Most: {names}."], [sizes(changes)])


def _spectra(changes: Sequence[LayerChange]) -> Section:
    ranks = [each.spectrum.effective_rank for each in changes]
    text = [
        "Singular values of W' - W, as shares of the largest singular value of W.",
        f"Effective rank: {min(ranks):.1f} to {max(ranks):.1f}, median {float(np.median(ranks)):.1f}.",
    ]
    if not all(each.spectrum.complete for each in changes):
        text.append("Of large matrices the 64 largest values are shown, and the effective rank is of those.")
    return Section("Spectrum of the update", text, [spectra(changes)])


def _similarity(found: Analysis) -> Section:
    text = [
        "Cosines of the whole updates: one for equal directions, zero for unrelated ones, minus one for opposite ones."
    ]
    return Section("Similarity of adapters", text, [similarity(found)])


def _drift(found: Analysis, steps: Sequence[int]) -> Section:
    return Section("Along the checkpoints", [], [drift(found, steps)])


def _layers(changes: Sequence[LayerChange]) -> Section:
    if len(changes) > MANY:
        rows = [{"type": kind, **_means([each for each in changes if each.kind == kind])} for kind in kinds_of(changes)]
        return Section("Types of layers", [], tables=[Table(rows)])
    rows = [
        {
            "layer": each.layer,
            "rows": each.shape[0],
            "columns": each.shape[1],
            "magnitude, %": 100 * each.change.magnitude,
            "growth, %": 100 * each.change.growth,
            "angle, degrees": each.change.degrees,
            "size, %": 100 * each.change.size,
            "effective rank": each.spectrum.effective_rank,
        }
        for each in changes
    ]
    return Section("Layers", [], tables=[Table(rows)])


def _means(changes: Sequence[LayerChange]) -> dict[str, float]:
    ranks = [each.spectrum.effective_rank for each in changes]
    return {**means([each.change for each in changes]), "effective rank": float(np.mean(ranks))}
