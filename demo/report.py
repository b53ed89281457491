"""The demo's results: metrics, their tables on the screen and their file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor

from benchmarks.environment import environment
from demo.many import ManyAdapters
from demo.model import CLASSES
from demo.train import History, Settings


@dataclass(frozen=True)
class Score:
    """One model on the test sentences: how many it classifies correctly, with how many trained parameters."""

    name: str
    correct: int
    count: int
    trained_parameters: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        ends = stats.binomtest(self.correct, self.count).proportion_ci(method="wilson")
        return float(ends.low), float(ends.high)


@dataclass(frozen=True)
class Comparison:
    """The majority class, the frozen model and DVoRA; and how many sentences only one of the latter two gets right."""

    majority: Score
    frozen: Score
    dvora: Score
    only_dvora: int
    only_frozen: int

    @property
    def chance(self) -> float:
        """That a fair coin splits the sentences that only one of them gets right so unevenly (McNemar's exact test)."""
        differing = self.only_dvora + self.only_frozen
        return float(stats.binomtest(self.only_dvora, differing).pvalue) if differing else 1.0


@dataclass(frozen=True)
class Findings:
    """All measurements of the demo. Differences are the largest between two logits."""

    scores: Comparison
    adapter_bytes: int
    model_bytes: int
    fresh_process_difference: float
    merged_difference: float
    history: History


def compare(
    train_labels: Tensor, labels: Tensor, frozen: Tensor, adapted: Tensor, head_parameters: int, dvora_parameters: int
) -> Comparison:
    """Score the predictions for the test sentences.

    Args:
        train_labels: (M,) classes of the training sentences, for the majority.
        labels: (N,) classes of the test sentences.
        frozen: (N, classes) logits of the frozen model.
        adapted: (N, classes) logits of the model with DVoRA.
        head_parameters: number of parameters trained for the frozen model.
        dvora_parameters: number of parameters trained for DVoRA, the head's included.
    """
    majority_right = labels == train_labels.bincount().argmax()
    frozen_right, dvora_right = frozen.argmax(1) == labels, adapted.argmax(1) == labels
    return Comparison(
        majority=Score("majority class", int(majority_right.sum()), len(labels), 0),
        frozen=Score("frozen, trained head", int(frozen_right.sum()), len(labels), head_parameters),
        dvora=Score("DVoRA", int(dvora_right.sum()), len(labels), dvora_parameters),
        only_dvora=int((dvora_right & ~frozen_right).sum()),
        only_frozen=int((frozen_right & ~dvora_right).sum()),
    )


def print_findings(findings: Findings, console: Console) -> None:
    """Print the table of accuracies and the other measurements."""
    scores, history = findings.scores, findings.history
    table = Table(title="Is the movie good or bad?", title_justify="left")
    table.add_column("")
    for heading in ("test accuracy", "95 % interval", "trained parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in (scores.majority, scores.frozen, scores.dvora):
        low, high = score.interval
        table.add_row(score.name, f"{score.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{score.trained_parameters:,}")
    console.print(table)
    for line in (
        f"Of {scores.dvora.count:,} test sentences, only DVoRA classifies {scores.only_dvora} correctly, and only the "
        f"frozen model {scores.only_frozen} (sign test: p = {scores.chance:.1g}).",
        f"The adapter's file has {findings.adapter_bytes / 1e3:,.0f} kB, the model's {findings.model_bytes / 1e6:,.1f} "
        f"MB: {findings.model_bytes / findings.adapter_bytes:,.0f} times as much.",
        f"Loaded in a fresh process, its outputs differ by at most {findings.fresh_process_difference:.2g}; "
        f"merged into the weights, by {findings.merged_difference:.2g}.",
        f"Training took {history.seconds:.0f} s for {len(history.steps)} steps.",
    ):
        console.print(line, highlight=False)


def print_predictions(texts: list[str], logits: Tensor, console: Console) -> None:
    """Print each sentence with its class and that class's probability."""
    table = Table(title="What DVoRA says", title_justify="left")
    table.add_column("sentence", overflow="fold")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for text, probabilities in zip(texts, logits.softmax(1), strict=True):
        best = int(probabilities.argmax())
        table.add_row(Text(text), CLASSES[best], f"{probabilities[best].item():.1%}")
    console.print(table)


def save_findings(findings: Findings, many: ManyAdapters, settings: Settings, seed: int, file: Path) -> None:
    """Write the metrics, with settings and environment, as JSON."""
    scores, history = findings.scores, findings.history
    content = {
        "environment": environment(),
        "seed": seed,
        "settings": asdict(settings),
        "scores": {
            name: _score(score)
            for name, score in (("majority", scores.majority), ("frozen", scores.frozen), ("dvora", scores.dvora))
        },
        "only_dvora_correct": scores.only_dvora,
        "only_frozen_correct": scores.only_frozen,
        "sign_test": scores.chance,
        "adapter_bytes": findings.adapter_bytes,
        "model_bytes": findings.model_bytes,
        "largest_logit_difference": {
            "fresh_process": findings.fresh_process_difference,
            "merged": findings.merged_difference,
        },
        "training_seconds": round(history.seconds, 1),
        "training_steps": len(history.steps),
        "many_adapters": asdict(many),
        "validation": [{"step": step, "loss": loss, "accuracy": share} for step, loss, share in history.checks],
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _score(score: Score) -> dict[str, object]:
    return {
        "name": score.name,
        "correct": score.correct,
        "count": score.count,
        "trained_values": score.trained_parameters,
        "accuracy": score.accuracy,
        "interval": score.interval,
    }
