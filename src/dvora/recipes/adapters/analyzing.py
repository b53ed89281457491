"""What adapters in folders changed: one, several beside each other, or the checkpoints of one training."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...adapter_file.values_file import SETTINGS
from ...tools.analysis import Analysis, analyze
from ...whole_files import new_file
from ..models.adapters import adapter_on, load_adapted, read_adapter
from ..run_folder import ADAPTER, RECORD
from ..training.checkpoints import CHECKPOINT, step_of


def analyze_folders(folders: Sequence[Path], model: str | None = None) -> tuple[Analysis, tuple[int, ...] | None]:
    """Measure what adapters changed in their base.

    Args:
        folders: of adapters, or of runs of `dvora train`; or a single one with the `checkpoint-*` of a trainer.
        model: the base; None: the one that the first adapter names.

    Returns:
        The analysis, and the steps of the checkpoints, where the adapters are those of one training.

    Raises:
        ValueError: a folder holds no adapter, or the adapters are of several methods or do not fit the base.
    """
    checkpoints = _checkpoints(folders[0]) if len(folders) == 1 else []
    folders = checkpoints or folders
    adapters = [read_adapter(folder) for folder in folders]
    methods = dict.fromkeys(adapter.method for adapter in adapters)
    if len(methods) > 1:
        raise ValueError(f"the adapters are of several methods ({', '.join(methods)}); compare those of one method")
    adapted = load_adapted(adapters[0], model)
    # Names of folders may be none that PEFT takes.
    names = ["default", *(f"adapter{number}" for number in range(2, len(adapters) + 1))]
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        adapter_on(adapted, adapter, name)
    analysis = replace(analyze(adapted, names), adapters=tuple(_names(folders)))
    return analysis, tuple(map(step_of, checkpoints)) or None


def write_report(analysis: Analysis, steps: Sequence[int] | None, what: str, page: Path) -> Path:
    """Write the page, whose name ends in .html, and the numbers beside it as JSON; returns their file.

    Raises:
        OSError: a file cannot be written.
    """
    from ...tools.analysis.report import report

    text = report(analysis, f"What training changed: {what}", "Made by dvora analyze.", steps)
    # Both take their names when both are written.
    with new_file(page) as html, new_file(page.with_suffix(".json")) as numbers:
        html.write(text.encode())
        numbers.write((json.dumps({**analysis.to_dict(), "steps": steps}, indent=1) + "\n").encode())
    return page.with_suffix(".json")


def _checkpoints(folder: Path) -> list[Path]:
    """Those that a trainer left in a folder, by step; none in the folder of an adapter."""
    if not folder.is_dir() or (folder / SETTINGS).is_file():
        return []
    inside = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and (path / SETTINGS).is_file()]
    return sorted(inside, key=step_of)


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names, each once."""
    names: list[str] = []
    for folder in folders:
        path = folder.resolve()
        is_run = path.name == ADAPTER and (path.parent / RECORD).is_file()
        name = (path.parent.name if is_run else path.name) or "adapter"
        earlier = names.count(name) + sum(other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({earlier + 1})" if earlier else name)
    return names
