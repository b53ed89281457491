"""The tables, the file of metrics and the plot, on small inputs."""

import json
from pathlib import Path

import torch
from rich.console import Console

from demo.many import ManyAdapters
from demo.plot import save_plot
from demo.report import Comparison, Findings, compare, print_findings, save_findings
from demo.statistics import KINDS, LayerChange
from demo.train import History, Settings

HISTORY = History(steps=[0.7, 0.6, 0.65, 0.5], checks=[(0, 0.69, 0.5), (4, 0.52, 0.75)], seconds=1.5)
LABELS = torch.tensor([0, 1, 1, 0])


def logits(predictions: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), 2).float()


def comparison() -> Comparison:
    return compare(torch.tensor([1, 1, 0]), LABELS, logits([0, 0, 0, 0]), logits([1, 1, 1, 0]), 6, 60)


def findings() -> Findings:
    return Findings(comparison(), 220_000, 90_000_000, 0.0, 2e-6, HISTORY)


MANY = ManyAdapters(
    rows=64, adapter_bytes=206_000, base_seconds=0.1, one_seconds=0.2, many_seconds=0.21, largest_difference=1e-6
)


def test_the_report_has_every_number() -> None:
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as printed:
        print_findings(findings(), console)
    text = printed.get()
    for number in ("50.0%", "75.0%", "60", "220 kB", "90.0 MB: 409 times", "at most 0;", "by 2e-06", "2 s for 4 steps"):
        assert number in text, number


def test_the_file_can_be_read_back(tmp_path: Path) -> None:
    settings = Settings(1, 32, 1e-2, 1e-3, 1e-3, 0.1, 4)
    save_findings(findings(), MANY, settings, 7, tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["seed"] == 7
    assert content["scores"]["dvora"]["accuracy"] == 0.75
    assert content["settings"]["batch"] == 32
    assert content["many_adapters"]["rows"] == 64


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    changes = [LayerChange(layer, kind, 0.01, 2.0) for layer in range(2) for kind in KINDS.values()]
    save_plot(HISTORY, changes, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
