"""What adapters in folders changed: one, several beside each other, or the checkpoints of one training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...tools.analysis import Analysis, analyze
from ...whole_files import new_file
from ..models.adapter_folder import SETTINGS, read_adapter
from ..models.adapters import load_adapted, with_another
from ..run_folder import ADAPTER, RECORD
from ..training.checkpoints import CHECKPOINT, step_of


@dataclass(frozen=True)
class Analyzed:
    """The analysis of adapters in folders.

    Args:
        analysis: of them, in the order of the folders.
        steps: of the checkpoints, where they are those of one training.
    """

    analysis: Analysis
    steps: tuple[int, ...] | None


def analyze_folders(folders: Sequence[Path], model: str | None = None) -> Analyzed:
    """Measure what adapters changed in their base.

    Args:
        folders: of adapters, or of runs of `dvora train`; or a single one with the `checkpoint-*` of a trainer.
        model: the base; None: the one that the first adapter names.

    Raises:
        ValueError: a folder holds no adapter, or the adapters are of several methods or do not fit the base.
    """
    found = _checkpoints(folders[0]) if len(folders) == 1 else []
    adapters = [read_adapter(folder) for folder in found or folders]
    methods = dict.fromkeys(adapter.method for adapter in adapters)
    if len(methods) > 1:
        raise ValueError(f"the adapters are of several methods ({', '.join(methods)}); compare those of one method")
    adapted = load_adapted(adapters[0], model)
    # Names of folders may be none that PEFT takes.
    names = ["default", *(f"adapter{number}" for number in range(2, len(adapters) + 1))]
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        with_another(adapted, adapter, name)
    analysis = analyze(adapted, names)
    steps = tuple(map(step_of, found)) if found else None
    return Analyzed(replace(analysis, adapters=tuple(_names(found or folders))), steps)


def write_report(found: Analyzed, folders: Sequence[Path], page: Path) -> Path:
    """Write the page, and the numbers beside it as JSON; returns their file.

    Raises:
        ValueError: the page's name does not end in .html.
        OSError: a file cannot be written.
    """
    from ...tools.analysis.page import report

    if page.suffix != ".html":
        raise ValueError(f"the report is a page: {page} has to end in .html")
    what = folders[0].resolve().name if len(folders) == 1 else f"{len(folders)} adapters"
    text = report(found.analysis, f"What training changed: {what}", "Made by dvora analyze.", found.steps)
    values = {**found.analysis.to_dict(), "steps": found.steps}
    # Both take their names when both are written.
    with new_file(page) as html, new_file(page.with_suffix(".json")) as numbers:
        html.write(text.encode())
        numbers.write((json.dumps(values, indent=1) + "\n").encode())
    return page.with_suffix(".json")


def _checkpoints(folder: Path) -> list[Path]:
    """Those that a trainer left in a folder, by step; none in the folder of an adapter."""
    if not folder.is_dir() or _is_adapter(folder):
        return []
    found = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and _is_adapter(path)]
    return sorted(found, key=step_of)


def _is_adapter(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names, each once."""
    names: list[str] = []
    for folder in folders:
        path = folder.resolve()
        of_run = path.name == ADAPTER and (path.parent / RECORD).is_file()
        name = (path.parent.name if of_run else path.name) or "adapter"
        earlier = names.count(name) + sum(each.startswith(f"{name} (") for each in names)
        names.append(f"{name} ({earlier + 1})" if earlier else name)
    return names
